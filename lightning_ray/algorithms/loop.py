"""The loop of a run that trains weights: collect a step's rollouts, settle, update, swap, prove.

    runners  --play-->  GroupFlow  --take-->  settle  --batch-->  trainer ranks  --swap, proof-->  replicas
       ^________________ fill (free slots) ______|________________________________________________|

Or rollouts that were played before take the place of the runners' (``algorithms.source``). Each of several policies
has trainer ranks and replicas of its own, which are updated, and then swapped, at the same time.

A killed trainer rank costs the steps since the last checkpoint: the ranks are started anew from it, under the next
version number, while engine and runners stay as they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_ray.algorithms.source import Played
from lightning_ray.errors import TrainersLostError
from lightning_ray.run.phases import PhaseClock
from lightning_ray.run.step_figures import StepTimes
from lightning_ray.stopping import Stopped

if TYPE_CHECKING:
    from lightning_ray.algorithms.weights import WeightAlgorithm
    from lightning_ray.run.run import Run

T = TypeVar("T")
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
        run = self._run
        await run.start(self._settings)
        await self._source.begin()
        self._clock.lap()
        try:
            with run.stop.heard():
                await self._steps()
        finally:
            await self._source.stop()
        await run.finish()

    async def _steps(self) -> None:
        failures = 0
        while self._run.state.step < self._settings.steps:
            try:
                await self._step(self._run.state.step)
                failures = 0
            except TrainersLostError as error:
                failures += 1
                if failures > RESTARTS_IN_A_ROW:
                    raise
                await self._recover(error)
            except Stopped:
                await self._keep_the_rest()
                raise

    async def _step(self, step: int) -> None:
        run, settings, clock = self._run, self._settings, self._clock
        began = time.perf_counter()
        with clock.phase("rollouts"):
            played = await run.stop.unless_asked(self._source.collect(step))
        run.folder.append_step(played.record(step, {name: policy.version for name, policy in run.policies.items()}))
        collected = time.perf_counter() - began
        updates = await self._learn_from(played)
        self._source.release(played)
        whole, phases = time.perf_counter() - began, clock.lap()
        playing = sum(phases.values()) if settings.pace() else collected
        times = StepTimes(playing, whole, phases)
        run.record_step(step, played, updates, times)
        await run.trace_step(step, played, times)
        if settings.validate_every and (step + 1) % settings.validate_every == 0 and step + 1 < settings.steps:
            with clock.phase("validate"):
                await run.validate()
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        with self._clock.phase("checkpoint"):
            self._run.state.flow = await self._source.state()
            await self._run.checkpoint()

    async def _keep_the_rest(self) -> None:
        """Keep what was made since the last checkpoint."""
        folder, step = self._run.folder, self._run.state.step
        if step and (folder.latest_checkpoint() is None or folder.read_state()["step"] < step):
            await self._checkpoint()
        told = f"stopped after step {step}, with a checkpoint" if step else "stopped before a step was made"
        self._run.reporter.note(told)

    async def _learn_from(self, played: Played) -> dict[str, dict[str, Any]]:
        """Update and swap the policies that have something to learn from; returns the figures of their updates."""
        clock = self._clock
        names = [name for name, share in played.shares.items() if share.account.trained]
        learning = [self._run.policies[name] for name in names]
        batches = [await self._settings.scored(played.batch(name), clock) for name in names]
        if not learning:
            return {}
        with clock.phase("update"):
            updates = await all_of(policy.update(batch) for policy, batch in zip(learning, batches, strict=True))
        with clock.phase("swap"):
            await all_of(policy.publish(policy.version + 1) for policy in learning)
        return dict(zip(names, updates, strict=True))

    async def _recover(self, error: TrainersLostError) -> None:
        """Start the ranks anew from the last checkpoint, and go back to its step."""
        with self._clock.phase("restart"):
            await self._source.stop()
            await self._run.restart_trainers(str(error))
            await self._source.begin(keep=False)  # what is on its way is of versions whose numbers are long past


async def all_of(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, once all have come to their end; then the first failure is raised, a lost rank before others:
    nothing is left in the middle.
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in sorted(failures, key=lambda error: not isinstance(error, TrainersLostError)):
        raise failure
    return [result for result in results if not isinstance(result, BaseException)]
