"""What an agent returned, turned into spans of its attempt: one place for every legal return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ray.emitter.rewards import reward_attributes
from lightning_ray.errors import AgentError
from lightning_ray.semconv import AGL_ANNOTATION
from lightning_ray.span import Span, SpanCoreFields
from lightning_ray.tracing.attempt import AttemptTrace, Row

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

PRIMARY = "primary"
"""The dimension that is trained on, when a returned map of rewards has several."""
LEGAL = (
    "return a number (the reward), a map of rewards with one entry or one called 'primary', a list of spans, or None"
)

RolloutRawResult = (
    float | Mapping[str, float] | Sequence["ReadableSpan | Span | SpanCoreFields"] | None  # type: ignore[valid-type]
)


def spans_of_result(result: Any, trace: AttemptTrace, agent: str = "agent") -> list[Row]:
    """Record what an agent returned as spans of ``trace``; returns those that it adds.

    None adds nothing. A number or a map of numbers is a reward. Spans (ours, their core fields, or OpenTelemetry's)
    are added as the attempt's; those that were recorded already are not added again.
    Raises AgentError naming ``agent`` for anything else.
    """
    if result is None:
        return []
    if isinstance(result, Sequence) and not isinstance(result, (str, bytes)):
        return [row for item in result if (row := _added(item, trace, agent)) is not None]
    try:
        attributes = reward_attributes(result, _primary(result))
    except (TypeError, ValueError) as error:
        raise AgentError(f"agent {agent!r} returned {_described(result)}: {error}; {LEGAL}") from error
    return [trace.add(AGL_ANNOTATION, attributes)]


def _primary(result: Any) -> str | None:
    if not isinstance(result, Mapping):
        return None
    return next(iter(result)) if len(result) == 1 else PRIMARY


def _added(item: Any, trace: AttemptTrace, agent: str) -> Row | None:
    if isinstance(item, SpanCoreFields):
        status, times = item.status, (item.start_time, item.end_time)
        return trace.add(item.name, item.attributes, status.status_code, status.description, *times)
    if isinstance(item, Span):
        foreign = (item.rollout_id or trace.rollout_id, item.attempt_id or trace.attempt_id)
        if foreign != (trace.rollout_id, trace.attempt_id):
            raise AgentError(
                f"agent {agent!r} returned span {item.name!r} of rollout {foreign[0]!r}, attempt {foreign[1]!r} in "
                f"rollout {trace.rollout_id!r}, attempt {trace.attempt_id!r}; leave the ids empty, or use the rollout's"
            )
        row = {**item.model_dump(), "rollout_id": trace.rollout_id, "attempt_id": trace.attempt_id, "sequence_id": 0}
    elif hasattr(item, "get_span_context") and hasattr(item, "instrumentation_scope"):
        from lightning_ray.tracing.rows import row_of

        row = row_of(item, trace)
    else:
        raise AgentError(f"agent {agent!r} returned a list with {_described(item)}; {LEGAL}")
    return None if trace.knows(row["span_id"]) else trace.record(row)


def _described(value: Any) -> str:
    kind = type(value).__name__
    if inspect.isawaitable(value):
        return f"{kind} {value!r:.80}, which nothing awaits: make the agent 'async def'"
    return f"{kind} {value!r:.80}"
