"""The nouns: resources, rollouts, attempts and spans, named as in Agent Lightning 0.3.

Importable in a bare interpreter: no ray, no torch, no vllm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

RolloutStatus = Literal["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
AttemptStatus = Literal["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
RolloutMode = Literal["train", "val", "test"]

TERMINAL_ROLLOUT: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
TERMINAL_ATTEMPT: frozenset[str] = frozenset({"succeeded", "failed", "timeout", "unresponsive"})

TaskInput = Any
T_co = TypeVar("T_co", covariant=True)


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
        """Fill the holes. Only ``f-string`` templates are rendered here."""
        if self.engine != "f-string":
            raise NotImplementedError(f"PromptTemplate engine {self.engine!r} has no renderer; use 'f-string'")
        return self.template.format(**kwargs)


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


class SpanStatus(BaseModel):
    """How a span ended, in OpenTelemetry's terms."""

    status_code: Literal["UNSET", "OK", "ERROR"] = "UNSET"
    description: str | None = None


class Span(BaseModel):
    """One recorded event or operation of an attempt. Times are Unix seconds."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    trace_id: str
    span_id: str
    parent_id: str | None = None
    name: str
    status: SpanStatus = Field(default_factory=SpanStatus)
    attributes: dict[str, Any] = Field(default_factory=dict)
    events: list[dict[str, Any]] = Field(default_factory=list)
    links: list[dict[str, Any]] = Field(default_factory=list)
    start_time: float | None = None
    end_time: float | None = None


Clock = Callable[[], float]
