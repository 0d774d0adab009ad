"""Rollouts that the run's own policy plays: groups of each task, in slots, settled and where told played again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.flow import Group, GroupFlow
from lightning_ray.algorithms.group_player import GroupPlayer
from lightning_ray.algorithms.source import Played
from lightning_ray.data import Epochs

if TYPE_CHECKING:
    from lightning_ray.algorithms.weights import WeightAlgorithm
    from lightning_ray.phases import PhaseClock
    from lightning_ray.run import Run


class PlayedRollouts:
    """``per_step`` tasks a step, each ``settings.group_size`` times; groups that the account wants resampled are played
    again up to ``max_resamples`` times in a step.
    """

    def __init__(
        self, settings: WeightAlgorithm, run: Run, clock: PhaseClock, per_step: int, max_resamples: int = 0
    ) -> None:
        self._settings = settings
        self._run = run
        self._clock = clock
        self._per_step = per_step
        self._max_resamples = max_resamples
        self._flow: GroupFlow

    async def begin(self, keep: bool = True) -> None:
        """Take up the groups of the last checkpoint, or begin; what they played until then is kept, or not."""
        run, settings = self._run, self._settings
        known = run.state.flow
        begun = known.get("next_position", run.state.step * self._per_step)
        seed = settings.seed if settings.reproducible else None
        player = GroupPlayer(run, Epochs(run.train_dataset, settings.seed), settings.group_size, seed)
        groups = [Group(**group) for group in known.get("groups", ())]
        last = begun - len(groups) + (settings.steps - run.state.step) * self._per_step
        self._flow = GroupFlow(player, self._per_step, settings.max_staleness, begun, last)
        if not keep:
            groups = [Group(group.position, run.state.version) for group in groups]
        await self._flow.restore(groups, run.state.version)

    async def collect(self, step: int) -> Played:
        """A step's groups, settled. Groups that are to be played again take the slots of those that were dropped."""
        run = self._run
        await self._flow.fill(run.state.version)
        played = Played()
        wanted, tries = self._per_step, 0
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
            if not again or tries > self._max_resamples:
                break
            self._flow.release(group.group_id for group in again)
            await self._flow.again([group.position for group in again], run.state.version)
            wanted = len(again)
        run.check_tokens(played.account, self._settings.max_staleness)
        return played

    def release(self, played: Played) -> None:
        """Free the slots of a step's groups."""
        self._flow.release(played.groups)

    async def state(self) -> dict[str, Any]:
        """See ``GroupFlow.state``."""
        return await self._flow.state()

    async def stop(self) -> None:
        """Cancel what is being played."""
        await self._flow.stop()

    async def _settle(self, groups: Sequence[Group]) -> Played:
        group_of = {rollout_id: group.group_id for group in groups for rollout_id in group.rollout_ids}
        episodes = await self._run.read(list(group_of))
        account = self._settings.settle(episodes, group_of, self._run.state.version - self._settings.max_staleness)
        return Played(episodes, group_of, [group.group_id for group in groups], account)
