"""Queues the rollouts of groups, and tells of their end."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.flow import Group
from lightning_ray.data import Epochs
from lightning_ray.types import TERMINAL_ROLLOUT

if TYPE_CHECKING:
    from lightning_ray.run.run import Run


class GroupPlayer:
    """Plays each task of an endless sequence ``group_size`` times, sampled from the policy.

    With ``seed``, every rollout samples with a seed of its own that depends on the run's seed and its place alone.
    """

    def __init__(self, run: Run, tasks: Epochs, group_size: int, seed: int | None = None):
        self._run = run
        self._tasks = tasks
        self._group_size = group_size
        self._seed = seed

    async def queue(self, groups: Sequence[Group]) -> None:
        """Queue what the groups lack of rollouts, and note their ids."""
        requests = []
        for group in groups:
            [task] = self._tasks.take(group.position, 1)
            for index in range(len(group.rollout_ids), self._group_size):
                request = self._run.request(task, "train", "sampled", self._metadata(group, index))
                group.rollout_ids.append(str(request.rollout_id))
                requests.append(request)
        if requests:
            await self._run.store.enqueue_many_rollouts(requests)

    async def wait(self, rollout_ids: Sequence[str]) -> None:
        """Return when all have ended."""
        await self._run.wait_for(rollout_ids)

    async def ended(self, rollout_ids: Sequence[str]) -> list[str]:
        """Those of them that have ended."""
        if not rollout_ids:
            return []
        found = await self._run.store.query_rollouts(rollout_id_in=rollout_ids, status_in=list(TERMINAL_ROLLOUT))  # type: ignore[arg-type]
        return [rollout.rollout_id for rollout in found]

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        """Stop those that have not ended."""
        update = self._run.store.update_rollout
        await asyncio.gather(*(update(rollout_id, status="cancelled") for rollout_id in rollout_ids))

    def _metadata(self, group: Group, index: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {"group_id": group.group_id, "position": group.position}
        if self._seed is not None:
            metadata["seed"] = zlib.crc32(f"{self._seed} {group.position} {index}".encode())
        return metadata
