"""The loop of a run that trains weights: fill the slots, take a step's groups, settle, update, swap, prove.

    runners  --play-->  GroupFlow  --take-->  settle  --batch-->  trainer ranks  --swap, proof-->  replicas
       ^________________ fill (free slots) ______|________________________________________________|

A killed trainer rank costs the steps since the last checkpoint: the ranks are started anew from it, under the next
version number, while engine and runners stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.flow import Group, GroupFlow
from lightning_ray.algorithms.group_player import GroupPlayer
from lightning_ray.data import Epochs
from lightning_ray.errors import TrainersLostError
from lightning_ray.phases import PhaseClock
from lightning_ray.step_figures import StepTimes
from lightning_ray.trajectories.account import Account, batch_of, settle
from lightning_ray.trajectories.episode import Episode

if TYPE_CHECKING:
    from lightning_ray.algorithms.grpo import GRPO
    from lightning_ray.run import Run

RESTARTS_IN_A_ROW = 3
"""Of the trainer ranks, without a step between them, before the run gives up."""


@dataclass
class Played:
    """What was played for one step, and what became of it."""

    episodes: list[Episode] = field(default_factory=list)
    group_of: dict[str, str] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    account: Account = field(default_factory=Account)

    def record(self, step: int, version: int) -> dict[str, Any]:
        """The line of steps.jsonl: what the step settled, in its order, under the weights of ``version``."""
        groups: dict[str, list[str]] = {}
        for rollout_id, group_id in self.group_of.items():
            groups.setdefault(group_id, []).append(rollout_id)
        trained = len(self.account.trained)
        return {"step": step, "version": version, "groups": list(groups.items()), "trained": trained}


class TrainingLoop:
    """One run's steps."""

    def __init__(self, settings: GRPO, run: Run):
        self._settings = settings
        self._run = run
        self._flow: GroupFlow
        self._clock = PhaseClock()

    async def learn(self) -> None:
        """From the first step that is missing to the last."""
        run, settings = self._run, self._settings
        await run.start(settings)
        await self._take_up()
        self._clock = PhaseClock()
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
            await self._flow.stop()
        await run.finish()

    async def _take_up(self, keep: bool = True) -> None:
        """The groups of the last checkpoint, or of the beginning; what they played until then is kept, or not."""
        run, settings = self._run, self._settings
        known = run.state.flow
        begun = known.get("next_position", run.state.step * settings.prompts_per_step)
        seed = settings.seed if settings.reproducible else None
        player = GroupPlayer(run, Epochs(run.train_dataset, settings.seed), settings.group_size, seed)
        last = settings.steps * settings.prompts_per_step
        self._flow = GroupFlow(player, settings.prompts_per_step, settings.max_staleness, begun, last)
        groups = [Group(**group) for group in known.get("groups", ())]
        if not keep:
            groups = [Group(group.position, run.state.version) for group in groups]
        await self._flow.restore(groups)

    async def _step(self, step: int) -> None:
        run, settings, clock = self._run, self._settings, self._clock
        began = time.perf_counter()
        with clock.phase("rollouts"):
            await self._flow.fill(run.state.version)
            played = await self._collect()
        run.folder.append_step(played.record(step, run.state.version))
        collected = time.perf_counter() - began
        update = await self._learn_from(played)
        self._flow.release(played.groups)
        whole, phases = time.perf_counter() - began, clock.lap()
        playing = sum(phases.values()) if settings.max_staleness else collected
        run.record_step(step, played.episodes, played.account, update, StepTimes(playing, whole, phases))
        if settings.validate_every and (step + 1) % settings.validate_every == 0 and step + 1 < settings.steps:
            with clock.phase("validate"):
                await run.validate()
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            with clock.phase("checkpoint"):
                run.state.flow = await self._flow.state()
                await run.checkpoint()

    async def _learn_from(self, played: Played) -> dict[str, Any]:
        """Update and swap, if there is something to learn from; returns the update's figures."""
        run, clock = self._run, self._clock
        if not played.account.trained:
            return {}
        with clock.phase("update"):
            run.check_tokens(played.account, self._settings.max_staleness)
            update = await run.update(batch_of(played.account.trained, played.group_of))
        with clock.phase("swap"):
            await run.publish(run.state.version + 1)
        return update

    async def _collect(self) -> Played:
        """A step's groups, settled. Groups that are to be played again take the slots of those that were dropped."""
        run, settings = self._run, self._settings
        played = Played()
        wanted, tries = settings.prompts_per_step, 0
        while wanted:
            groups = await self._flow.take(wanted, run.state.version)
            with self._clock.phase("settle"):
                part = await self._settle(groups)
            played.episodes += part.episodes
            played.group_of |= part.group_of
            played.groups += part.groups
            played.account.add(part.account)
            again = [group for group in groups if group.group_id in set(part.account.resample)]
            tries += 1
            if not again or tries > settings.max_resamples:
                break
            self._flow.release(group.group_id for group in again)
            await self._flow.again([group.position for group in again], run.state.version)
            wanted = len(again)
        return played

    async def _settle(self, groups: Sequence[Group]) -> Played:
        run, settings = self._run, self._settings
        group_of = {rollout_id: group.group_id for group in groups for rollout_id in group.rollout_ids}
        episodes = await run.read(list(group_of))
        oldest = run.state.version - settings.max_staleness
        account = settle(episodes, group_of, settings.batch, oldest)
        return Played(episodes, group_of, [group.group_id for group in groups], account)

    async def _recover(self, error: TrainersLostError) -> None:
        """Start the ranks anew from the last checkpoint, and go back to its step."""
        with self._clock.phase("restart"):
            await self._flow.stop()
            await self._run.restart_trainers(str(error))
            await self._take_up(keep=False)  # it is of versions whose numbers are long past
