"""A run's traces as spans of OpenTelemetry's SDK, made of what its store holds.

    attempt                        root, told by the store's record of the attempt
      chat                         a client's call, as the agent's process saw it
        openai.chat.completion     the same call, captured at the replica
          queue, prefill, decode   told by its times
      annotation, operation ...    what the agent, its framework and its tools traced
      trained --link--> train_step, a trace of its own that links back to every attempt that it learned from

Every span of an attempt is under one trace id (``trace_ids``), whatever recorded it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from lightning_ray.otel import flatten_attributes, sanitize_attributes
from lightning_ray.semconv import (
    ATTEMPT_SPAN,
    CLIENT_SPAN,
    DROPPED_SPAN,
    MODEL_CALL_NAMES,
    STEP_SPAN,
    TRAINED_SPAN,
    LightningResourceAttributes,
)
from lightning_ray.trace_ids import part_id_of, root_id_of, trace_id_of
from lightning_ray.types import Attempt, Rollout, Span

CONTENT = ("request", "data", "gen_ai.prompt", "gen_ai.completion", "gen_ai.input", "gen_ai.output")
"""Attributes, by how they begin, that hold what was said; left out unless it is asked for."""
_SCOPE = InstrumentationScope("lightning_ray")
_OF_STEP = ("lightning_ray.step", "lightning_ray.policy", "lightning_ray.version")


class TraceExport:
    """Makes spans of one run, named ``run``; ``content`` keeps what was said to and by models."""

    def __init__(self, run: str, content: bool = False):
        self._run = run
        self._content = content
        self._steps: dict[tuple[str, str], list[Span]] = {}

    def attempt(
        self, rollout: Rollout, attempt: Attempt, spans: Sequence[Span], calls: Mapping[str, Sequence[int]]
    ) -> Iterator[ReadableSpan]:
        """The trace of an attempt: its ``spans``, of which captured ``calls`` are given with their weight versions."""
        ids = {span.span_id for span in spans}
        root = root_id_of(rollout.rollout_id, attempt.attempt_id)
        trace = trace_id_of(rollout.rollout_id, attempt.attempt_id)
        yield self._root(rollout, attempt, trace, root, spans)
        for span in spans:
            parent = span.attributes.get(CLIENT_SPAN) or span.parent_id
            own = self._span(span, trace, parent if parent in ids else root, calls.get(span.span_id))
            yield own
            if is_captured(span):
                yield from self._parts(span, own)
            if span.name in (TRAINED_SPAN, DROPPED_SPAN) and span.links:
                step = span.links[0].context
                self._steps.setdefault((step.trace_id, step.span_id), []).append(span)

    def steps(self, figures: Mapping[int, Mapping[str, Any]]) -> Iterator[ReadableSpan]:
        """The training steps that the attempts so far tell of; ``figures`` has what else is known of each."""
        for (trace, span_id), told in self._steps.items():
            step = {name: told[0].attributes[name] for name in _OF_STEP}
            counts = {
                "lightning_ray.rollouts_trained": sum(span.name == TRAINED_SPAN for span in told),
                "lightning_ray.rollouts_dropped": sum(span.name == DROPPED_SPAN for span in told),
            }
            yield ReadableSpan(
                name=STEP_SPAN,
                context=_context(trace, span_id),
                resource=self._resource("trainer", {}),
                attributes=sanitize_attributes({**step, **counts, **figures.get(step["lightning_ray.step"], {})}),
                links=[Link(_context(trace_id_of(s.rollout_id, s.attempt_id), s.span_id)) for s in told],
                status=Status(StatusCode.OK),
                start_time=_nanoseconds(min(span.start_time or 0.0 for span in told)),
                end_time=_nanoseconds(max(span.end_time or 0.0 for span in told)),
                instrumentation_scope=_SCOPE,
            )

    def _root(self, rollout: Rollout, attempt: Attempt, trace: str, root: str, spans: Sequence[Span]) -> ReadableSpan:
        ends = [span.end_time for span in spans if span.end_time is not None and span.name not in _AFTERWARDS]
        told = {
            "status": attempt.status,
            "mode": rollout.mode,
            "worker": attempt.worker_id,
            "attempt": attempt.sequence_id,
            "metadata": rollout.metadata,
            "reason": (attempt.metadata or {}).get("reason"),
        }
        attributes = {f"lightning_ray.{name}": value for name, value in told.items() if value is not None}
        return ReadableSpan(
            name=ATTEMPT_SPAN,
            context=_context(trace, root),
            resource=self._resource("runner", _ids(rollout.rollout_id, attempt.attempt_id)),
            attributes=sanitize_attributes(flatten_attributes(attributes)),
            status=_status("OK" if attempt.status == "succeeded" else "ERROR", attempt.status),
            start_time=_nanoseconds(attempt.start_time),
            end_time=_nanoseconds(attempt.end_time or max(ends, default=attempt.start_time)),
            instrumentation_scope=_SCOPE,
        )

    def _span(self, span: Span, trace: str, parent: str, call: Sequence[int] | None) -> ReadableSpan:
        by = "policy" if call is not None else "trainer" if span.name in _AFTERWARDS else "runner"
        by = "relay" if call is None and is_captured(span) else by
        extra = span.__pydantic_extra__ or {}
        scope = extra.get("instrumentation_scope") or {}
        attributes = _told_of_call(span, extra, call or ()) if is_captured(span) else span.attributes
        if self._content and is_captured(span):
            attributes = {**attributes, "gen_ai.input.messages": json.dumps(span.attributes.get("request"))}
        return ReadableSpan(
            name=span.name,
            context=_context(trace, span.span_id),
            parent=_context(trace, parent),
            resource=self._resource(by, _ids(span.rollout_id, span.attempt_id)),
            attributes=sanitize_attributes(self._shown(flatten_attributes(attributes))),
            events=[Event(e.name, sanitize_attributes(e.attributes), _nanoseconds(e.timestamp)) for e in span.events],
            links=[Link(_context(link.context.trace_id, link.context.span_id)) for link in span.links],
            kind=SpanKind.SERVER if is_captured(span) else SpanKind[extra.get("kind", "INTERNAL")],
            status=_status(span.status.status_code, span.status.description),
            start_time=_nanoseconds(span.start_time),
            end_time=_nanoseconds(span.end_time or span.start_time),
            instrumentation_scope=InstrumentationScope(scope["name"], scope.get("version")) if scope else _SCOPE,
        )

    def _parts(self, span: Span, call: ReadableSpan) -> Iterator[ReadableSpan]:
        """What a call did with its time: wait in the engine, read the prompt, sample."""
        timing = span.attributes.get("timing") or {}
        begin, queue, first = span.start_time, timing.get("queue"), timing.get("first_token")
        if begin is None or span.end_time is None or first is None:
            return
        prefill, decode = begin + min(queue or 0.0, first), begin + first
        for name, start, end in (
            ("queue", begin, prefill),
            ("prefill", prefill, decode),
            ("decode", decode, max(decode, span.end_time)),
        ):
            yield ReadableSpan(
                name=f"lightning_ray.{name}",
                context=_context(f"{call.context.trace_id:032x}", part_id_of(span.span_id, name)),
                parent=call.context,
                resource=call.resource,
                start_time=_nanoseconds(start),
                end_time=_nanoseconds(end),
                instrumentation_scope=_SCOPE,
            )

    def _shown(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        hidden = () if self._content else CONTENT
        return {key: value for key, value in attributes.items() if value is not None and not key.startswith(hidden)}

    def _resource(self, by: str, ids: Mapping[str, str]) -> Resource:
        return Resource({"service.name": f"{self._run}/{by}", "lightning_ray.run": self._run, **ids})


_AFTERWARDS = (TRAINED_SPAN, DROPPED_SPAN)
_CALLS = frozenset(MODEL_CALL_NAMES.values())


def is_captured(span: Span) -> bool:
    """Whether it is a model call as a replica or the relay saw it."""
    return span.name in _CALLS and "timing" in span.attributes


def _told_of_call(span: Span, columns: Mapping[str, Any], versions: Sequence[int]) -> dict[str, Any]:
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


def _ids(rollout_id: str, attempt_id: str) -> dict[str, str]:
    """Resource attributes that say whose spans these are: what our own OTLP route goes by."""
    names = LightningResourceAttributes
    return {names.ROLLOUT_ID.value: rollout_id, names.ATTEMPT_ID.value: attempt_id}


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1))


def _status(code: str, description: str | None) -> Status:
    return Status(StatusCode[code], description if code == "ERROR" else None)


def _nanoseconds(seconds: float | None) -> int:
    return round((seconds or 0.0) * 1e9)


def bundles(spans: Iterable[ReadableSpan], size: int) -> Iterator[list[ReadableSpan]]:
    """The spans, so many at a time."""
    bundle: list[ReadableSpan] = []
    for span in spans:
        bundle.append(span)
        if len(bundle) == size:
            yield bundle
            bundle = []
    if bundle:
        yield bundle
