"""The nouns: resources, rollouts, attempts and spans, named as in Agent Lightning 0.3.

Importable in a bare interpreter: no ray, no torch, no vllm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field

from lightning_ray.span import Event as Event
from lightning_ray.span import Link as Link
from lightning_ray.span import OtelResource as OtelResource
from lightning_ray.span import Span as Span
from lightning_ray.span import SpanContext as SpanContext
from lightning_ray.span import SpanCoreFields as SpanCoreFields
from lightning_ray.span import SpanStatus as SpanStatus
from lightning_ray.span import TraceStatus as TraceStatus

RolloutStatus = Literal["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
AttemptStatus = Literal["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
RolloutMode = Literal["train", "val", "test"]
WorkerStatus = Literal["idle", "busy", "unknown"]
SortOrder = Literal["asc", "desc"]
FilterLogic = Literal["and", "or"]

TERMINAL_ROLLOUT: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
TERMINAL_ATTEMPT: frozenset[str] = frozenset({"succeeded", "failed", "timeout", "unresponsive"})

TaskInput = Any
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Unset:
    """The type of UNSET, which tells an argument left out from an explicit None."""

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "UNSET"


UNSET = Unset()


class Dataset(Protocol[T_co]):
    """Anything with a length and integer indexing: a list, a Hugging Face dataset, a torch dataset."""

    def __getitem__(self, index: int) -> T_co: ...

    def __len__(self) -> int: ...


class Resource(BaseModel):
    """Something an algorithm tunes and an agent receives."""

    resource_type: Any


class LLM(Resource):
    """An endpoint that speaks the OpenAI API."""

    resource_type: Literal["llm"] = "llm"
    endpoint: str
    """Base URL for clients, up to and including ``/v1``."""
    model: str
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = Field(default_factory=dict)

    def get_base_url(self, *args: Any, **kwargs: Any) -> str:
        """The base URL for clients; extra arguments are accepted so that it can stand in for ProxyLLM."""
        return self.endpoint


class ProxyLLM(LLM):
    """An endpoint that captures: each attempt gets its own address under it."""

    resource_type: Literal["proxy_llm"] = "proxy_llm"  # type: ignore[assignment]

    def get_base_url(self, rollout_id: str | None = None, attempt_id: str | None = None) -> str:  # type: ignore[override]
        """The address of one attempt, ``.../rollout/{rollout_id}/attempt/{attempt_id}/v1``.

        Without ids, the bare endpoint. Raises ValueError if only one id is given.
        """
        if rollout_id is None and attempt_id is None:
            return self.endpoint
        if rollout_id is None or attempt_id is None:
            raise ValueError("rollout_id and attempt_id must be given together")
        root = self.endpoint.rstrip("/")
        suffix = ""
        if root.endswith("/v1"):
            root, suffix = root[:-3], "/v1"
        return f"{root}/rollout/{rollout_id}/attempt/{attempt_id}{suffix}"

    def with_attempted_rollout(self, rollout: AttemptedRollout) -> LLM:
        """The plain LLM that one attempt uses."""
        return LLM(
            endpoint=self.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id),
            model=self.model,
            sampling_parameters=self.sampling_parameters,
            api_key=self.api_key,
        )


class PromptTemplate(Resource):
    """A prompt with holes, filled by ``format``."""

    resource_type: Literal["prompt_template"] = "prompt_template"
    template: str
    engine: Literal["jinja", "f-string", "poml"] = "f-string"

    def format(self, **kwargs: Any) -> str:
        """Fill the holes. Raises ``templates.TemplateError`` when they cannot be filled, and says why."""
        from lightning_ray.templates import render

        return render(self.engine, self.template, kwargs)


ResourceUnion = LLM | ProxyLLM | PromptTemplate
NamedResources = dict[str, ResourceUnion]


class ResourcesUpdate(BaseModel):
    """One published version of the resources."""

    resources_id: str
    create_time: float
    update_time: float
    version: int = 1
    resources: dict[str, ResourceUnion]


class Attempt(BaseModel):
    """One execution of a rollout. Times are Unix seconds."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    start_time: float
    end_time: float | None = None
    status: AttemptStatus = "preparing"
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    metadata: dict[str, Any] | None = None


def _no_conditions() -> list[AttemptStatus]:
    return []


class RolloutConfig(BaseModel):
    """When a rollout's attempt is given up, and whether another one follows."""

    model_config = ConfigDict(extra="forbid")

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = Field(default=1, ge=1)
    retry_condition: list[AttemptStatus] = Field(default_factory=_no_conditions)


class Rollout(BaseModel):
    """One run of an agent on one task, over all its attempts. Times are Unix seconds."""

    rollout_id: str
    input: TaskInput
    start_time: float
    end_time: float | None = None
    mode: RolloutMode | None = None
    resources_id: str | None = None
    status: RolloutStatus = "queuing"
    config: RolloutConfig = Field(default_factory=RolloutConfig)
    metadata: dict[str, Any] | None = None


class AttemptedRollout(Rollout):
    """A rollout with the attempt that is at work on it."""

    attempt: Attempt


class EnqueueRolloutRequest(BaseModel):
    """What it takes to queue a rollout. A caller that may resend supplies its own ``rollout_id``."""

    input: TaskInput
    rollout_id: str | None = None
    mode: RolloutMode | None = None
    resources_id: str | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None


class Worker(BaseModel):
    """What is known of a runner. Times are Unix seconds; the current ids are those of its newest attempt."""

    worker_id: str
    status: WorkerStatus = "unknown"
    heartbeat_stats: dict[str, Any] | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None


class PaginatedResult(BaseModel, Generic[T]):
    """One page of a query's answer; behaves as the sequence of its items. ``total`` counts all pages' items,
    ``limit`` -1 means no limit.
    """

    items: list[T]
    limit: int = -1
    offset: int = 0
    total: int

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.items[index]

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        return iter(self.items)

    def __contains__(self, item: object) -> bool:
        return item in self.items

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence):
            return self.items == list(other)
        return super().__eq__(other)


Clock = Callable[[], float]
