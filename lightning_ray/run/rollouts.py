"""The rollouts of a run: queued under its limits, waited for with a deadline, and read back when they have ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from lightning_ray.errors import AgentError, InfrastructureError
from lightning_ray.run.step_figures import agents_of
from lightning_ray.store.base import Store
from lightning_ray.trajectories.episode import Episode, last_attempts, read_episodes
from lightning_ray.types import (
    TERMINAL_ROLLOUT,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
    RolloutMode,
)
from lightning_ray.waiting import waiting

T = TypeVar("T")
SPARE_SECONDS = 120.0
"""For rollouts to end beyond what their own limits allow."""
ANSWER_SECONDS = 60.0
"""For the store's answer beyond that."""


@dataclass(frozen=True)
class Ended:
    """Rollouts that have ended, with their spans."""

    rollouts: list[Rollout]
    spans: pa.Table
    attempts: dict[str, str]
    """The attempt that counts for each rollout."""

    def episodes(self, agent_match: str | None = None, policy: str | None = None) -> list[Episode]:
        """In their order; see ``read_episodes``."""
        return read_episodes(self.rollouts, self.spans, self.attempts, agent_match, policy)

    def agents(self) -> dict[str, set[str]]:
        """By rollout, the agents that took part."""
        return agents_of(self.spans, self.attempts)


class RunRollouts:
    """See the module. ``failure`` carries why runners die again and again, if they do."""

    def __init__(self, store: Store, failure: asyncio.Future[None], timeout_seconds: float, max_attempts: int):
        self._store = store
        self._failure = failure
        self._timeout = timeout_seconds
        self._max_attempts = max_attempts
        self.resume()

    def interrupt(self, error: InfrastructureError) -> None:
        """Have all who wait for rollouts raise this, until ``resume``: what rollouts need to end is lost."""
        if not self._interruption.done():
            self._interruption.set_exception(error)
            self._interruption.exception()

    def resume(self) -> None:
        """Rollouts can be waited for again."""
        self._interruption: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def cancel_leftovers(self) -> None:
        """Rollouts that an interrupted run left open are played again under new ids."""
        left = await self._store.query_rollouts(status_in=["queuing", "preparing", "running", "requeuing"])
        await asyncio.gather(*(self._store.update_rollout(each.rollout_id, status="cancelled") for each in left))

    def request(
        self, task: Any, mode: RolloutMode, resources_id: str, metadata: dict[str, Any]
    ) -> EnqueueRolloutRequest:
        """What queues one rollout of a task, under the run's limits and an id of its own."""
        return EnqueueRolloutRequest(
            input=task,
            rollout_id=self._store.new_rollout_id(near=metadata.get("group_id")),
            mode=mode,
            resources_id=resources_id,
            config=RolloutConfig(
                timeout_seconds=self._timeout,
                max_attempts=self._max_attempts,
                retry_condition=["timeout", "unresponsive"],
            ),
            metadata=metadata,
        )

    async def wait_for(self, rollout_ids: Sequence[str]) -> None:
        """Return when all rollouts have ended. Raises InfrastructureError past the deadline that their own limits
        set, or when the runners fail, and whatever ``interrupt`` is given.
        """
        deadline = self._timeout * self._max_attempts + SPARE_SECONDS
        ending = self._store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=deadline)
        with waiting(f"{len(rollout_ids)} rollouts"):
            ended = await self._unless_broken_off(ending, deadline + ANSWER_SECONDS)
        if len(ended) < len(rollout_ids):
            rollouts = await self._store.query_rollouts(rollout_id_in=rollout_ids)
            states = dict(Counter(r.status for r in rollouts if r.status not in TERMINAL_ROLLOUT))
            raise InfrastructureError(
                f"{len(rollout_ids) - len(ended)} of {len(rollout_ids)} rollouts did not end within {deadline:.0f} s, "
                f"by state: {states}; the run's events.jsonl tells what runners and replicas were at, and who died"
            )

    async def read(self, rollout_ids: Sequence[str]) -> Ended:
        """Rollouts that have ended, in the order of their ids."""
        return await read_ended(self._store, rollout_ids)

    async def _unless_broken_off(self, waiting: Awaitable[T], deadline: float) -> T:
        task: asyncio.Future[T] = asyncio.ensure_future(waiting)
        breaks: list[asyncio.Future[Any]] = [self._failure, self._interruption]
        await asyncio.wait([task, *breaks], return_when=asyncio.FIRST_COMPLETED, timeout=deadline)
        for each in breaks:
            if each.done():
                task.cancel()
                each.result()
        if not task.done():
            task.cancel()
            raise InfrastructureError(f"the span store did not answer within {deadline:.0f} s")
        return task.result()


async def read_ended(store: Store, rollout_ids: Sequence[str]) -> Ended:
    """Rollouts that have ended, in the order of their ids."""
    found = {r.rollout_id: r for r in (await store.query_rollouts(rollout_id_in=rollout_ids)).items}
    spans = await store.scan_spans(rollout_ids)
    pairs = pairs_of(spans)
    counting = dict(pairs)
    for rollout_id, times in Counter(rollout_id for rollout_id, _ in pairs).items():
        if times > 1:
            counting |= last_attempts((await store.query_attempts(rollout_id)).items)
    return Ended([found[rollout_id] for rollout_id in rollout_ids], spans, counting)


def pairs_of(spans: pa.Table) -> set[tuple[str, str]]:
    """The (rollout, attempt) ids that left spans."""
    return set(zip(spans["rollout_id"].to_pylist(), spans["attempt_id"].to_pylist(), strict=True))


def refuse_total_failure(played: Sequence[Episode]) -> None:
    """Raises AgentError or InfrastructureError, with the reason, when every rollout failed: nothing can be learned."""
    failures = [(e.rollout.metadata or {}).get("failure") or {} for e in played if e.rollout.status == "failed"]
    if len(failures) < len(played):
        return
    [((kind, reason), count)] = Counter((f.get("kind"), f.get("reason")) for f in failures).most_common(1)
    if kind == "infrastructure":
        raise InfrastructureError(
            f"all {len(played)} rollouts failed, and not by the agent; most often ({count}x): {reason}. "
            "The run's events.jsonl tells who died, and why; then resume"
        )
    raise AgentError(
        f"the agent failed in all {len(played)} rollouts; most often ({count}x): {reason}. "
        "The exceptions with their tracebacks are in the run's span store"
    )
