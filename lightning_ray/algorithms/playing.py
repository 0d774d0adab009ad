"""Rollouts that the run's own policies play: groups of each task, in slots, settled and where told played again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.flow import Group, GroupFlow
from lightning_ray.algorithms.group_player import GroupPlayer
from lightning_ray.algorithms.source import Played, Share
from lightning_ray.data import Epochs
from lightning_ray.run.state import ONLY

if TYPE_CHECKING:
    from lightning_ray.algorithms.weights import WeightAlgorithm
    from lightning_ray.run.phases import PhaseClock
    from lightning_ray.run.run import Run


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
        self._flow = GroupFlow(player, self._per_step, settings.pace(), begun, last)
        if not keep:
            groups = [Group(group.position, run.state.step) for group in groups]
        await self._flow.restore(groups, run.state.step)

    async def collect(self, step: int) -> Played:
        """A step's groups, settled. Groups that are to be played again take the slots of those that were dropped."""
        await self._flow.fill(step)
        shares = {name: Share() for name in self._run.policies}
        group_of: dict[str, str] = {}
        taken: list[str] = []
        wanted, tries = self._per_step, 0
        while wanted:
            groups = await self._flow.take(wanted, step)
            taken += [group.group_id for group in groups]
            members = {rollout_id: group.group_id for group in groups for rollout_id in group.rollout_ids}
            group_of |= members
            with self._clock.phase("settle"):
                resample = await self._settle(members, shares)
            again = [group for group in groups if group.group_id in resample]
            tries += 1
            if not again or tries > self._max_resamples:
                break
            self._flow.release(group.group_id for group in again)
            await self._flow.again([group.position for group in again], step)
            wanted = len(again)
        for name, policy in self._run.policies.items():
            policy.check_tokens(shares[name].account)
        first = next(iter(shares.values()))
        if list(shares) == [ONLY]:
            return Played(first.episodes, group_of, taken, first.account)
        return Played(first.episodes, group_of, taken, several=shares)

    def release(self, played: Played) -> None:
        """Free the slots of a step's groups."""
        self._flow.release(played.groups)

    async def state(self) -> dict[str, Any]:
        """See ``GroupFlow.state``."""
        return await self._flow.state()

    async def stop(self) -> None:
        """Cancel what is being played."""
        await self._flow.stop()

    async def _settle(self, group_of: dict[str, str], shares: dict[str, Share]) -> set[str]:
        """Enter the groups into each policy's share; returns those that a policy wants played again."""
        resample: set[str] = set()
        for name, episodes in (await self._run.read_shares(list(group_of))).items():
            account = self._run.policies[name].settle(episodes, group_of)
            shares[name].episodes += episodes
            shares[name].account.add(account)
            resample.update(account.resample)
        return resample
