"""Rollouts to scores: a candidate's templates are published, tasks are queued with them, and their ends are read.

A failure of the agent is worth what it emitted until then, or 0. A failure of the infrastructure is worth nothing: it
is played again, and otherwise left out. What is left unfinished when its time is up is cancelled and left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.apo.candidates import Candidate
from lightning_ray.algorithms.apo.state import SearchState
from lightning_ray.emitter import find_final_reward
from lightning_ray.errors import AgentError, InfrastructureError
from lightning_ray.span import Span
from lightning_ray.types import EnqueueRolloutRequest, NamedResources, Rollout, RolloutConfig, RolloutMode

if TYPE_CHECKING:
    from lightning_ray.algorithms.apo.settings import APO
    from lightning_ray.store.base import Store

LOOK_SECONDS = 2.0
_OPEN: Any = ["queuing", "preparing", "running", "requeuing"]


@dataclass(frozen=True)
class Played:
    """One rollout as it ended."""

    index: int
    """Of the task in its data set."""
    task: Any
    rollout: Rollout
    spans: list[Span]
    reward: float | None
    """None if it counts for nothing."""

    @property
    def error(self) -> str | None:
        """Why it failed."""
        return None if self.rollout.status == "succeeded" else failure_of(self.rollout)["reason"]


class Scorer:
    """Plays candidates over one store; all that is asked of it at once is queued at once. ``state`` counts rollouts.

    ``on_change(ended, queued)`` is told how many rollouts have ended, of how many since ``begin``.
    """

    def __init__(
        self,
        store: Store,
        settings: APO[Any],
        state: SearchState,
        resources: Mapping[str, Any],
        on_change: Callable[[int, int], None] = lambda ended, queued: None,
    ):
        self._store = store
        self._settings = settings
        self._state = state
        self._resources = dict(resources)
        self._on_change = on_change
        self._waiting = 0
        self._ended = 0
        self._queued = 0
        self._last_masked: str | None = None

    def begin(self) -> None:
        """Count anew from here."""
        self._ended = self._queued = 0

    async def cancel_leftovers(self) -> None:
        """Rollouts that an interrupted run left open are played again under new ids."""
        for rollout in await self._store.query_rollouts(status_in=_OPEN):
            await self._store.update_rollout(rollout.rollout_id, status="cancelled")

    async def play(self, candidate: Candidate, tasks: Sequence[tuple[int, Any]], mode: RolloutMode) -> list[Played]:
        """Play tasks (index, task) with a candidate's templates, in their order.

        Raises AgentError if all ended well and none gave a reward.
        """
        resources: NamedResources = {**self._resources, **candidate.templates}
        await self._store.update_resources(candidate.version, resources)
        played = {one.index: one for one in await self._once(candidate, tasks, mode)}
        for _ in range(self._settings.infrastructure_retries):
            again = [(one.index, one.task) for one in played.values() if is_infrastructure(one.rollout)]
            if not again:
                break
            played |= {one.index: one for one in await self._once(candidate, again, mode)}
        found = list(played.values())
        for one in found:
            if one.reward is None:
                self._state.masked += 1
                self._last_masked = one.error
        refuse_no_reward(found)
        return found

    async def fill(self, candidate: Candidate, indices: Sequence[int], dataset: Any) -> None:
        """Have a candidate's rewards for these validation tasks; those that it has are not played again."""
        known = candidate.rewards.keys() | candidate.unfinished
        missing = [(index, dataset[index]) for index in indices if index not in known]
        if missing:
            for one in await self.play(candidate, missing, "val"):
                if one.reward is not None:
                    candidate.rewards[one.index] = one.reward
                elif one.rollout.status == "cancelled":
                    candidate.unfinished.add(one.index)

    def nothing_counts(self, what: str) -> InfrastructureError:
        """What to raise where there is nothing left to score ``what`` by."""
        return InfrastructureError(
            f"no rollout of {what} counts, and not by the agent; the last reason: {self._last_masked}. See the "
            "runners' logs in the Ray dashboard, then resume"
        )

    async def _once(self, candidate: Candidate, tasks: Sequence[tuple[int, Any]], mode: RolloutMode) -> list[Played]:
        config = RolloutConfig(timeout_seconds=self._settings.rollout_timeout_seconds)
        metadata = {"candidate": candidate.version}
        requests = [
            EnqueueRolloutRequest(
                input=task, mode=mode, resources_id=candidate.version, config=config, metadata=metadata
            )
            for _, task in tasks
        ]
        ids = [rollout.rollout_id for rollout in await self._store.enqueue_many_rollouts(requests)]
        self._state.rollouts += len(ids)
        self._queued += len(ids)
        await self._wait(ids)
        ended = {each.rollout_id: each for each in await self._store.query_rollouts(rollout_id_in=ids)}
        spans = await asyncio.gather(*(self._store.query_spans(rollout_id, "latest") for rollout_id in ids))
        return [
            Played(index, task, ended[rollout_id], found.items, reward_of(ended[rollout_id], found.items))
            for (index, task), rollout_id, found in zip(tasks, ids, spans, strict=True)
        ]

    async def _wait(self, ids: list[str]) -> None:
        """Until all have ended. Batches are played in the order of their queuing: one may wait for those before it."""
        self._waiting += 1
        deadline = time.monotonic() + self._settings.rollout_batch_timeout * self._waiting
        seen = 0
        try:
            while seen < len(ids) and (left := deadline - time.monotonic()) > 0:
                ended = await self._store.wait_for_rollouts(rollout_ids=ids, timeout=min(left, LOOK_SECONDS))
                self._ended, seen = self._ended + len(ended) - seen, len(ended)
                self._on_change(self._ended, self._queued)
        finally:
            self._waiting -= 1
        if seen < len(ids):
            for rollout in await self._store.query_rollouts(rollout_id_in=ids, status_in=_OPEN):
                await self._store.update_rollout(rollout.rollout_id, status="cancelled")


def failure_of(rollout: Rollout) -> dict[str, Any]:
    """Kind and reason of a rollout's bad end."""
    known = (rollout.metadata or {}).get("failure") or {}
    return {"kind": known.get("kind") or rollout.status, "reason": known.get("reason") or rollout.status}


def is_infrastructure(rollout: Rollout) -> bool:
    """Whether a rollout failed, and not by its agent."""
    return rollout.status == "failed" and failure_of(rollout)["kind"] == "infrastructure"


def reward_of(rollout: Rollout, spans: Sequence[Span]) -> float | None:
    """What a rollout that has ended counts; None for nothing."""
    if rollout.status == "cancelled" or is_infrastructure(rollout):
        return None
    return find_final_reward(spans) or 0.0


def refuse_no_reward(played: Sequence[Played]) -> None:
    """Raises AgentError if all ended well and none gave a reward."""
    if all(one.rollout.status == "succeeded" and find_final_reward(one.spans) is None for one in played):
        raise AgentError(
            f"the agent gave no reward in any of {len(played)} rollouts; return a number from it, or call emit_reward()"
        )
