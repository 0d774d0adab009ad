"""Groups of rollouts on their way: queued -> played -> taken for a step -> trained or dropped. Staleness by slots.

    slots = prompts_per_step x (1 + max_staleness)

A group holds a slot from the moment it is queued until it has been trained or dropped, and it is queued only into a
free slot. A group queued under version v must be trained at v + max_staleness at the latest; a step takes those that
have ended, oldest first, as soon as what is left can all be trained in time, and waits for those without which it
could not. Invariant: no group is trained more than ``max_staleness`` versions after it was queued, and no token is
older than its group. With 0 the flow is strictly on-policy: a step takes all that it queued. Whatever moves whenever
weights do, by one, may stand for their version: the step, where there are several policies.

Generation goes on while the trainer works: what is not taken is being played meanwhile, over swaps too.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol


@dataclass
class Group:
    """Rollouts of one task. ``position`` is the task's in the endless sequence of tasks."""

    position: int
    version: int
    """Of the weights that served when it was queued."""
    group_id: str = field(default_factory=lambda: f"gr-{uuid.uuid4().hex[:12]}")
    rollout_ids: list[str] = field(default_factory=list)


class Player(Protocol):
    """Queues groups and tells when their rollouts have ended."""

    async def queue(self, groups: Sequence[Group]) -> None:
        """Queue what the groups lack of rollouts, and note their ids."""

    async def wait(self, rollout_ids: Sequence[str]) -> None:
        """Return when all have ended. Raises InfrastructureError past the deadline."""

    async def ended(self, rollout_ids: Sequence[str]) -> list[str]:
        """Those of them that have ended."""

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        """Stop those that have not ended."""


class GroupFlow:
    """See the module. ``last`` is the position behind the last task of the run."""

    def __init__(self, player: Player, per_step: int, max_staleness: int, next_position: int, last: int):
        self._player = player
        self._per_step = per_step
        self._max_staleness = max_staleness
        self._next = next_position
        self._last = last
        self._live: dict[str, Group] = {}
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._done: dict[str, Group] = {}
        """Live groups whose waiting is over."""
        self._one_done = asyncio.Event()
        self._taken: dict[str, Group] = {}
        self._later: list[Group] = []

    @property
    def slots(self) -> int:
        """How many groups there may be between queueing and training."""
        return self._per_step * (1 + self._max_staleness)

    @property
    def busy(self) -> int:
        """Slots that are held."""
        return len(self._live) + len(self._taken)

    async def restore(self, groups: Iterable[Group], version: int) -> None:
        """Take up groups of before a resume at ``version``: what they lack is queued anew.

        The bound or the groups of a step may have become smaller since: those that could not be trained in time any
        more are played anew, by ``fill``.
        """
        kept: list[Group] = []
        for group in sorted(groups, key=lambda group: (group.version, group.position)):
            steps = group.version + self._max_staleness - version + 1
            in_time = len(kept) < steps * self._per_step
            (kept if in_time else self._later).append(group)
        await self._queue(kept)

    async def fill(self, version: int) -> None:
        """Queue groups into all free slots."""
        free = max(0, self.slots - self.busy)
        later, self._later = self._later[:free], self._later[free:]
        end = max(self._next, min(self._last, self._next + free - len(later)))
        positions = [*(group.position for group in later), *range(self._next, end)]
        self._next = end
        await self.again(positions, version)

    async def again(self, positions: Sequence[int], version: int) -> None:
        """Queue the tasks at these positions once more, into slots that ``release`` gave back."""
        await self._queue([Group(position, version) for position in positions])

    async def take(self, count: int, version: int) -> list[Group]:
        """``count`` groups for a step at ``version`` (fewer at the end of the run), in order of their positions. They
        keep their slots until ``release``.
        """
        while True:
            self._one_done.clear()
            ended = list(self._done.values())
            for group in ended:
                self._waiting[group.group_id].result()
            if len(ended) >= min(count, len(self._live)) and self._rest_is_in_time(ended, version):
                break
            if len(ended) == len(self._live):
                raise AssertionError(f"groups too old to be trained at version {version}: {ended}")
            await self._one_done.wait()
        chosen = sorted(ended, key=lambda group: (group.version, group.position))[:count]
        for group in chosen:
            self._taken[group.group_id] = self._live.pop(group.group_id)
            del self._waiting[group.group_id], self._done[group.group_id]
        return sorted(chosen, key=lambda g: g.position)

    def _rest_is_in_time(self, ended: Sequence[Group], version: int) -> bool:
        """Whether the steps from here on can train every group in its time, if this one takes the oldest that ended."""
        for deadline in {group.version + self._max_staleness for group in self._live.values()}:
            live = sum(group.version + self._max_staleness <= deadline for group in self._live.values())
            here = sum(group.version + self._max_staleness <= deadline for group in ended)
            if live - self._per_step * (deadline - version) > here:
                return False
        return True

    def release(self, group_ids: Iterable[str]) -> None:
        """These were trained or dropped: their slots are free."""
        for group_id in group_ids:
            self._taken.pop(group_id, None)

    async def state(self) -> dict[str, Any]:
        """What a resume needs: the next position, and the groups on their way with the rollouts that have ended."""
        live = sorted((*self._taken.values(), *self._live.values(), *self._later), key=lambda g: g.position)
        ended = set(await self._player.ended([rollout_id for group in live for rollout_id in group.rollout_ids]))
        groups = [{**asdict(g), "rollout_ids": [i for i in g.rollout_ids if i in ended]} for g in live]
        return {"next_position": self._next, "groups": groups}

    async def stop(self) -> None:
        """Cancel what is on its way."""
        rollouts = [rollout_id for group in self._live.values() for rollout_id in group.rollout_ids]
        for task in self._waiting.values():
            task.cancel()
        await asyncio.gather(*self._waiting.values(), return_exceptions=True)
        self._live, self._waiting, self._done, self._taken, self._later = {}, {}, {}, {}, []
        if rollouts:
            await self._player.cancel(rollouts)

    async def _queue(self, groups: Sequence[Group]) -> None:
        if groups:
            await self._player.queue(groups)
        for group in groups:
            self._live[group.group_id] = group
            waiting = self._waiting[group.group_id] = asyncio.create_task(self._player.wait(group.rollout_ids))
            waiting.add_done_callback(partial(self._note_done, group))

    def _note_done(self, group: Group, _: asyncio.Task[None]) -> None:
        if group.group_id in self._live:
            self._done[group.group_id] = group
            self._one_done.set()
