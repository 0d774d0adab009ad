"""The loop of a run that trains weights: collect a step's rollouts, settle, update, swap, prove.

    runners  --play-->  GroupFlow  --take-->  settle  --batch-->  trainer ranks  --swap, proof-->  replicas
       ^________________ fill (free slots) ______|________________________________________________|

Or rollouts that were played before take the place of the runners' (``algorithms.source``).

A killed trainer rank costs the steps since the last checkpoint: the ranks are started anew from it, under the next
version number, while engine and runners stay as they are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.source import Played
from lightning_ray.errors import TrainersLostError
from lightning_ray.phases import PhaseClock
from lightning_ray.step_figures import StepTimes

if TYPE_CHECKING:
    from lightning_ray.algorithms.weights import WeightAlgorithm
    from lightning_ray.run import Run

RESTARTS_IN_A_ROW = 3
"""Of the trainer ranks, without a step between them, before the run gives up."""


class TrainingLoop:
    """One run's steps."""

    def __init__(self, settings: WeightAlgorithm, run: Run, clock: PhaseClock | None = None):
        self._settings = settings
        self._run = run
        self._clock = PhaseClock() if clock is None else clock
        self._source = settings.source(run, self._clock)

    async def learn(self) -> None:
        """From the first step that is missing to the last."""
        run, settings = self._run, self._settings
        await run.start(settings)
        await self._source.begin()
        self._clock.lap()
        failures = 0
        try:
            while run.state.step < settings.steps:
                try:
                    await self._step(run.state.step)
                    failures = 0
                except TrainersLostError as error:
                    failures += 1
                    if failures > RESTARTS_IN_A_ROW:
                        raise
                    await self._recover(error)
        finally:
            await self._source.stop()
        await run.finish()

    async def _step(self, step: int) -> None:
        run, settings, clock = self._run, self._settings, self._clock
        began = time.perf_counter()
        with clock.phase("rollouts"):
            played = await self._source.collect(step)
        run.folder.append_step(played.record(step, run.state.version))
        collected = time.perf_counter() - began
        update = await self._learn_from(played)
        self._source.release(played)
        whole, phases = time.perf_counter() - began, clock.lap()
        playing = sum(phases.values()) if settings.max_staleness else collected
        run.record_step(step, played.episodes, played.account, update, StepTimes(playing, whole, phases))
        if settings.validate_every and (step + 1) % settings.validate_every == 0 and step + 1 < settings.steps:
            with clock.phase("validate"):
                await run.validate()
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            with clock.phase("checkpoint"):
                run.state.flow = await self._source.state()
                await run.checkpoint()

    async def _learn_from(self, played: Played) -> dict[str, Any]:
        """Update and swap, if there is something to learn from; returns the update's figures."""
        run, clock = self._run, self._clock
        if not played.account.trained:
            return {}
        batch = await self._settings.scored(played.batch(), clock)
        with clock.phase("update"):
            update = await run.update(batch)
        with clock.phase("swap"):
            await run.publish(run.state.version + 1)
        return update

    async def _recover(self, error: TrainersLostError) -> None:
        """Start the ranks anew from the last checkpoint, and go back to its step."""
        with self._clock.phase("restart"):
            await self._source.stop()
            await self._run.restart_trainers(str(error))
            await self._source.begin(keep=False)  # what is on its way is of versions whose numbers are long past
