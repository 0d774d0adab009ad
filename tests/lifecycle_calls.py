"""A lifecycle with a given clock and no disk, and short calls of it."""

from __future__ import annotations

from itertools import count
from typing import Any

from lightning_ray.store.lifecycle import Lifecycle
from lightning_ray.types import (
    Attempt,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
)

LEASE = 60.0
RETRY = RolloutConfig(max_attempts=2, retry_condition=["failed", "timeout", "unresponsive"])


def make() -> Lifecycle:
    numbers = count()
    return Lifecycle(LEASE, lambda prefix: f"{prefix}-{next(numbers)}")


def enqueue(lifecycle: Lifecycle, *ids: str, now: float = 0.0, config: RolloutConfig | None = None) -> None:
    requests = [EnqueueRolloutRequest(rollout_id=rollout_id, input={"q": 1}, config=config) for rollout_id in ids]
    lifecycle.enqueue(requests, now)


def finish(lifecycle: Lifecycle, rollout_id: str, attempt_id: str, status: str, metadata: Any, now: float) -> Rollout:
    return lifecycle.finish([(rollout_id, attempt_id, status, metadata)], now)[0]


def attempts(lifecycle: Lifecycle, rollout_id: str) -> list[Attempt]:
    return [attempt.model_copy() for attempt in lifecycle.state.rollouts[rollout_id].attempts]


def arrive(lifecycle: Lifecycle, rollout_id: str, attempt_id: str, now: float, last: int = 0) -> None:
    last = last or lifecycle.last_sequence(rollout_id) + 1
    lifecycle.spans_arrived([(rollout_id, attempt_id, 0, 1, last, last)], now)


def lease(lifecycle: Lifecycle, now: float = 0.0, worker_id: str = "w", request_id: str | None = None) -> str:
    return lifecycle.dequeue(1, worker_id, request_id, now)[0].attempt.attempt_id
