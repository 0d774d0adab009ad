"""A span of ours in OpenTelemetry's terms: whose it is, its ids, times and status, and what a model call tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from lightning_ray.semconv import DROPPED_SPAN, MODEL_CALL_NAMES, TRAINED_SPAN, LightningResourceAttributes
from lightning_ray.traces.ids import part_id_of
from lightning_ray.types import Span

AFTERWARDS = (TRAINED_SPAN, DROPPED_SPAN)
_CALLS = frozenset(MODEL_CALL_NAMES.values())


def service(span: Span, call: Sequence[int] | None) -> str:
    """Who made it; ``call`` has the weight versions of one that a replica captured."""
    if span.name in AFTERWARDS:
        return "trainer"
    if not is_captured(span):
        return "runner"
    return "relay" if call is None else "policy"


def is_captured(span: Span) -> bool:
    """Whether it is a model call as a replica or the relay saw it."""
    return span.name in _CALLS and "timing" in span.attributes


def told_of_call(span: Span, columns: Mapping[str, Any], versions: Sequence[int]) -> dict[str, Any]:
    """A captured call in OpenTelemetry's terms for generative models, and what is ours beside them."""
    usage = span.attributes.get("usage") or {}
    told = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": columns.get("model"),
        "gen_ai.agent.name": columns.get("agent"),
        "gen_ai.response.finish_reasons": [columns["finish_reason"]] if columns.get("finish_reason") else None,
        "gen_ai.usage.input_tokens": usage.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": usage.get("completion_tokens"),
        "lightning_ray.cached_tokens": usage.get("cached_tokens"),
        "lightning_ray.weight_versions": sorted(set(versions)) or None,
        "lightning_ray.timing": span.attributes.get("timing"),
        "lightning_ray.sampling": span.attributes.get("sampling"),
        "lightning_ray.retry": span.attributes.get("retry"),
        "lightning_ray.hung_up": span.attributes.get("hung_up"),
    }
    return {name: value for name, value in told.items() if value is not None}


def ids_of(rollout_id: str, attempt_id: str) -> dict[str, str]:
    """Resource attributes that say whose spans these are: what our own OTLP route goes by."""
    names = LightningResourceAttributes
    return {names.ROLLOUT_ID.value: rollout_id, names.ATTEMPT_ID.value: attempt_id}


def context(trace_id: str, span_id: str) -> SpanContext:
    """Which span in which trace."""
    return SpanContext(_number(trace_id, 32), _number(span_id, 16), is_remote=False, trace_flags=TraceFlags(1))


def _number(given: str, digits: int) -> int:
    """An id as a number; one that is not of OpenTelemetry's form, as users' own may be, becomes one that is."""
    is_usual = len(given) == digits and set(given) <= set("0123456789abcdef")
    return int(given if is_usual else part_id_of(given, "id"), 16)


def status(code: str, description: str | None) -> Status:
    """How it ended; only errors have words."""
    return Status(StatusCode[code], description if code == "ERROR" else None)


def nanoseconds(seconds: float | None) -> int:
    """Unix seconds in OpenTelemetry's unit."""
    return round((seconds or 0.0) * 1e9)
