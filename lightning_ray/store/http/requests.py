"""What requests hold: the bodies and query parameters of Agent Lightning 0.3's REST paths, and of ours.

A field that none of them knows is refused by name, so that a misspelt one is not lost.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lightning_ray.types import (
    AttemptStatus,
    EnqueueRolloutRequest,
    FilterLogic,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    SortOrder,
    TaskInput,
    WorkerStatus,
)


class Request(BaseModel):
    """The base of all bodies and query parameters."""

    model_config = ConfigDict(extra="forbid")

    def given(self) -> dict[str, Any]:
        """The fields that the request has, None included."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class AttemptName(Request):
    """Which attempt; also the body of ``spans/next``."""

    rollout_id: str
    attempt_id: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.rollout_id, self.attempt_id


class Enqueue(Request):
    rollouts: list[EnqueueRolloutRequest]


class Dequeue(Request):
    limit: int = 1
    worker_id: str | None = None
    timeout: float = Field(default=0.0, ge=0)
    request_id: str | None = None


class StartRollout(Request):
    input: TaskInput
    mode: RolloutMode | None = None
    resources_id: str | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None
    worker_id: str | None = None
    rollout_id: str | None = None
    attempt_id: str | None = None


class StartAttempt(Request):
    worker_id: str | None = None
    attempt_id: str | None = None


class UpdateRollout(Request):
    input: TaskInput | None = None
    mode: RolloutMode | None = None
    resources_id: str | None = None
    status: RolloutStatus | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None


class UpdateAttempt(Request):
    status: AttemptStatus | None = None
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    metadata: dict[str, Any] | None = None


class UpdateWorker(Request):
    heartbeat_stats: dict[str, Any] | None = None


class Finish(AttemptName):
    status: str
    metadata: dict[str, Any] | None = None


class FinishMany(Request):
    """``spans``: a list of spans, or in msgpack the bytes of an Arrow stream."""

    finishes: list[Finish]
    spans: list[dict[str, Any]] | bytes | None = None


class Heartbeat(Request):
    attempts: list[AttemptName]


class Release(Request):
    reason: str


class RolloutIds(Request):
    rollout_ids: list[str]


class WaitForRollouts(RolloutIds):
    timeout: float | None = Field(default=None, ge=0)


class NextSequenceIds(Request):
    attempts: list[AttemptName]


class ScanSpans(RolloutIds):
    attempt_id: str | None = None
    columns: list[str] | None = None


class Sql(Request):
    query: str


class PageRequest(Request):
    """What all queries have."""

    limit: int = -1
    offset: int = 0
    sort_by: str | None = None
    sort_order: SortOrder = "asc"


class QueryRollouts(PageRequest):
    status_in: list[RolloutStatus] | None = None
    rollout_id_in: list[str] | None = None
    rollout_id_contains: str | None = None
    filter_logic: FilterLogic = "and"


class QueryAttempts(PageRequest):
    sort_by: str | None = "sequence_id"


class QueryWorkers(PageRequest):
    status_in: list[WorkerStatus] | None = None
    worker_id_contains: str | None = None
    filter_logic: FilterLogic = "and"


class QueryResources(PageRequest):
    resources_id: str | None = None
    resources_id_contains: str | None = None


class QuerySpans(PageRequest):
    rollout_id: str
    attempt_id: str | Literal["latest"] | None = None
    trace_id: str | None = None
    trace_id_contains: str | None = None
    span_id: str | None = None
    span_id_contains: str | None = None
    parent_id: str | None = None
    parent_id_contains: str | None = None
    name: str | None = None
    name_contains: str | None = None
    filter_logic: FilterLogic = "and"
    sort_by: str | None = "sequence_id"
