"""Spans of OpenTelemetry's SDK as those of an attempt: plain values, cheaper than ``Span.from_opentelemetry``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_ray.span import instrumentation_scope, span_id_hex, trace_id_hex
from lightning_ray.tracing.attempt import AttemptTrace, Row

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


class ObservedSpan:
    """A span of OpenTelemetry's that has begun in ``trace``."""

    def __init__(self, span: ReadableSpan, trace: AttemptTrace):
        self._span = span
        self._trace = trace

    @property
    def name(self) -> str:
        """As it is now."""
        return self._span.name

    @property
    def attributes(self) -> Mapping[str, Any]:
        """As they are now."""
        return self._span.attributes or {}

    @property
    def parent_id(self) -> str | None:
        """None if its parent is the attempt."""
        return _parent_id(self._span, self._trace)

    def row(self) -> Row:
        """As it is now."""
        return row_of(self._span, self._trace)


def row_of(span: ReadableSpan, trace: AttemptTrace) -> Row:
    """The span as it is now, as one of ``trace``."""
    context, scope = span.get_span_context(), span.instrumentation_scope
    row: Row = {
        "rollout_id": trace.rollout_id,
        "attempt_id": trace.attempt_id,
        "sequence_id": 0,
        "trace_id": trace_id_hex(context.trace_id if context else 0),
        "span_id": span_id_hex(context.span_id if context else 0),
        "parent_id": _parent_id(span, trace),
        "name": span.name,
        "start_time": _seconds(span.start_time),
        "end_time": _seconds(span.end_time),
        "status": {"status_code": span.status.status_code.name, "description": span.status.description},
        "attributes": plain_attributes(span.attributes),
        "kind": span.kind.name,
    }
    if scope is not None and scope.name:
        row["instrumentation_scope"] = instrumentation_scope(scope.name, scope.version)
    if span.events:
        row["events"] = [
            {"name": e.name, "attributes": plain_attributes(e.attributes), "timestamp": _seconds(e.timestamp)}
            for e in span.events
        ]
    if span.links:
        row["links"] = [
            {
                "context": {"trace_id": trace_id_hex(to.context.trace_id), "span_id": span_id_hex(to.context.span_id)},
                "attributes": plain_attributes(to.attributes) or None,
            }
            for to in span.links
        ]
    if span.resource is not None and span.resource.attributes:
        row["resource"] = {
            "attributes": plain_attributes(span.resource.attributes),
            "schema_url": span.resource.schema_url or "",
        }
    return row


def _parent_id(span: ReadableSpan, trace: AttemptTrace) -> str | None:
    if span.parent is None:
        return None
    parent_id = span_id_hex(span.parent.span_id)
    return None if parent_id == trace.root_id else parent_id


def plain_attributes(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes with lists for tuples, as they come back from a store."""
    return {key: list(value) if type(value) is tuple else value for key, value in (attributes or {}).items()}


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9
