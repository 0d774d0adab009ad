"""A run's traces as spans of OpenTelemetry's SDK, made of what its store holds.

    attempt                        root, told by the store's record of the attempt
      chat                         a client's call, as the agent's process saw it
        openai.chat.completion     the same call, captured at the replica
          queue, prefill, decode   told by its times
      annotation, operation ...    what the agent, its framework and its tools traced
      trained --link--> train_step, a trace of its own that links back to every attempt that it learned from

Every span of an attempt is under one trace id (``traces.ids``), whatever recorded it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from lightning_ray.otel import flatten_attributes, sanitize_attributes
from lightning_ray.semconv import ATTEMPT_SPAN, CLIENT_SPAN, DROPPED_SPAN, STEP_SPAN, TRAINED_SPAN
from lightning_ray.traces.ids import part_id_of, root_id_of, trace_id_of
from lightning_ray.traces.terms import (
    AFTERWARDS,
    context,
    ids_of,
    is_captured,
    nanoseconds,
    service,
    status,
    told_of_call,
)
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
                context=context(trace, span_id),
                resource=self._resource("trainer", {}),
                attributes=sanitize_attributes({**step, **counts, **figures.get(step["lightning_ray.step"], {})}),
                links=[Link(context(trace_id_of(s.rollout_id, s.attempt_id), s.span_id)) for s in told],
                status=Status(StatusCode.OK),
                start_time=nanoseconds(min(span.start_time or 0.0 for span in told)),
                end_time=nanoseconds(max(span.end_time or 0.0 for span in told)),
                instrumentation_scope=_SCOPE,
            )

    def _root(self, rollout: Rollout, attempt: Attempt, trace: str, root: str, spans: Sequence[Span]) -> ReadableSpan:
        ends = [span.end_time for span in spans if span.end_time is not None and span.name not in AFTERWARDS]
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
            context=context(trace, root),
            resource=self._resource("runner", ids_of(rollout.rollout_id, attempt.attempt_id)),
            attributes=self._shown(attributes),
            status=status("OK" if attempt.status == "succeeded" else "ERROR", attempt.status),
            start_time=nanoseconds(attempt.start_time),
            end_time=nanoseconds(attempt.end_time or max(ends, default=attempt.start_time)),
            instrumentation_scope=_SCOPE,
        )

    def _span(self, span: Span, trace: str, parent: str, call: Sequence[int] | None) -> ReadableSpan:
        extra = span.__pydantic_extra__ or {}
        scope = extra.get("instrumentation_scope") or {}
        attributes = told_of_call(span, extra, call or ()) if is_captured(span) else span.attributes
        if self._content and is_captured(span):
            attributes = {**attributes, "gen_ai.input.messages": json.dumps(span.attributes.get("request"))}
        return ReadableSpan(
            name=span.name,
            context=context(trace, span.span_id),
            parent=context(trace, parent),
            resource=self._resource(service(span, call), ids_of(span.rollout_id, span.attempt_id)),
            attributes=self._shown(attributes),
            events=[Event(e.name, sanitize_attributes(e.attributes), nanoseconds(e.timestamp)) for e in span.events],
            links=[Link(context(link.context.trace_id, link.context.span_id)) for link in span.links],
            kind=SpanKind.SERVER if is_captured(span) else SpanKind[extra.get("kind", "INTERNAL")],
            status=status(span.status.status_code, span.status.description),
            start_time=nanoseconds(span.start_time),
            end_time=nanoseconds(span.end_time or span.start_time),
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
                context=context(f"{call.context.trace_id:032x}", part_id_of(span.span_id, name)),
                parent=call.context,
                resource=call.resource,
                start_time=nanoseconds(start),
                end_time=nanoseconds(end),
                instrumentation_scope=_SCOPE,
            )

    def _shown(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """What OpenTelemetry can hold, without what was said."""
        hidden, told = () if self._content else CONTENT, attributes
        with contextlib.suppress(ValueError):  # maps whose keys are no names stay as they are
            told = flatten_attributes(told)
        return sanitize_attributes({k: v for k, v in told.items() if v is not None and not k.startswith(hidden)})

    def _resource(self, by: str, ids: Mapping[str, str]) -> Resource:
        return Resource({"service.name": f"{self._run}/{by}", "lightning_ray.run": self._run, **ids})


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
