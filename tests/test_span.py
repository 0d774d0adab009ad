"""Spans: made from OpenTelemetry's, from attributes and from their core, as Agent Lightning 0.3 makes them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link as OtelLink
from opentelemetry.trace import SpanContext as OtelContext
from opentelemetry.trace import SpanKind, Status, StatusCode, TraceFlags, TraceState
from pydantic import ValidationError

from lightning_ray import types
from lightning_ray.semconv import AGL_VIRTUAL
from lightning_ray.span import (
    Event,
    Link,
    OtelResource,
    Span,
    SpanContext,
    SpanCoreFields,
    SpanStatus,
    TraceStatus,
    convert_timestamp,
)
from lightning_ray.store.schema import read_spans, spans_to_batch

IDS = {"rollout_id": "ro-1", "attempt_id": "at-1"}


def otel_span(**fields: Any) -> ReadableSpan:
    context = OtelContext(0xAB, 0xCD, False, TraceFlags(1), TraceState([("vendor", "x")]))
    return ReadableSpan("work", context=context, **fields)


def test_every_part_comes_over_from_opentelemetry() -> None:
    provider = TracerProvider(resource=Resource({"service.name": "agent"}, "https://schema"))
    tracer = provider.get_tracer("library", "1.2")
    other = OtelContext(1, 2, True, TraceFlags(1), TraceState([("vendor", "x")]))
    with tracer.start_as_current_span("parent") as parent:
        child = tracer.start_span(
            "child", kind=SpanKind.CLIENT, links=[OtelLink(other, {"why": "y"})], attributes={"list": (1, 2), "n": 1.5}
        )
        child.add_event("happened", {"ok": True}, timestamp=2_000_000_000_000_000_000)
        child.set_status(Status(StatusCode.ERROR, "no"))
        child.end(end_time=3_000_000_000_500_000_000)
    span = Span.from_opentelemetry(child, **IDS, sequence_id=7)  # type: ignore[arg-type]

    trace_id = f"{child.context.trace_id:032x}"  # type: ignore[attr-defined]
    assert (span.rollout_id, span.attempt_id, span.sequence_id) == ("ro-1", "at-1", 7)
    assert (span.trace_id, span.span_id) == (trace_id, f"{child.context.span_id:016x}")  # type: ignore[attr-defined]
    assert span.parent_id == f"{parent.get_span_context().span_id:016x}"
    assert (span.name, span.end_time) == ("child", 3_000_000_000.5)
    assert span.status == TraceStatus(status_code="ERROR", description="no")
    assert span.attributes == {"list": [1, 2], "n": 1.5}
    assert span.events == [Event(name="happened", attributes={"ok": True}, timestamp=2e9)]
    linked = SpanContext(trace_id=f"{1:032x}", span_id=f"{2:016x}", is_remote=True, trace_state={"vendor": "x"})
    assert span.links == [Link(context=linked, attributes={"why": "y"})]
    assert span.context == SpanContext(trace_id=trace_id, span_id=span.span_id)
    assert span.parent == SpanContext(trace_id=trace_id, span_id=span.parent_id)
    assert span.resource == OtelResource(attributes={"service.name": "agent"}, schema_url="https://schema")
    assert span.model_extra == {"kind": "CLIENT", "instrumentation_scope": {"name": "library", "version": "1.2"}}
    assert read_spans(spans_to_batch([span])) == [span]


def test_a_bare_span_of_opentelemetry() -> None:
    span = Span.from_opentelemetry(otel_span(), "ro-1", "at-1", 1)
    assert (span.trace_id, span.span_id) == ("ab".zfill(32), "cd".zfill(16))
    assert (span.start_time, span.end_time, span.parent, span.parent_id) == (None, None, None, None)
    assert span.context is not None and span.context.trace_state == {"vendor": "x"}
    without_context = Span.from_opentelemetry(ReadableSpan("work"), "ro-1", "at-1", 1)
    assert (without_context.trace_id, without_context.context) == ("0" * 32, None)


def test_from_attributes() -> None:
    span = Span.from_attributes(attributes={"a": 1})
    assert (span.rollout_id, span.attempt_id, span.sequence_id, span.name) == ("", "", 0, AGL_VIRTUAL)
    assert (len(span.trace_id), len(span.span_id)) == (32, 16)
    assert span.context == SpanContext(trace_id=span.trace_id, span_id=span.span_id)
    assert (span.status.status_code, span.parent) == ("OK", None)
    assert Span.from_attributes(attributes={}).span_id != span.span_id
    child = Span.from_attributes(attributes={}, trace_id="t", span_id="s", parent_id="p", **IDS)
    assert child.parent == SpanContext(trace_id="t", span_id="p")


def test_from_core_fields() -> None:
    core = SpanCoreFields(
        name="op", status=TraceStatus(status_code="ERROR"), attributes={"a": 1}, start_time=None, end_time=9.0
    )
    span = Span.from_core_fields(core, **IDS, sequence_id=3)
    assert (span.name, span.status, span.attributes, span.end_time) == ("op", core.status, core.attributes, 9.0)
    assert span.start_time is not None
    assert Span.from_core_fields(core.model_copy(update={"start_time": 1.0})).start_time == 1.0


def test_what_is_no_field_is_kept() -> None:
    span = Span(**IDS, sequence_id=1, trace_id="t", span_id="s", name="n", kind="INTERNAL", deep={"a": [1]})
    assert span.model_extra == {"kind": "INTERNAL", "deep": {"a": [1]}}
    assert Span.model_validate(span.model_dump()) == span
    assert Span.model_validate_json(span.model_dump_json()) == span


def test_a_span_needs_its_ids() -> None:
    with pytest.raises(ValidationError, match="trace_id"):
        Span(**IDS, sequence_id=1, span_id="s", name="n")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, None), (0, None), (1_700_000_000_500_000_000, 1_700_000_000.5), (1.5, 1.5)]
)
def test_times_are_seconds(given: float | None, seconds: float | None) -> None:
    assert convert_timestamp(given) == seconds


def test_the_nouns_have_the_names_of_the_spans_parts() -> None:
    assert SpanStatus is TraceStatus
    for name in ("Span", "SpanStatus", "TraceStatus", "Event", "Link", "SpanContext", "OtelResource", "SpanCoreFields"):
        assert hasattr(types, name)


def test_no_opentelemetry_is_imported() -> None:
    code = "import sys, lightning_ray.span; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
