"""Spans and their parts, field by field those of Agent Lightning 0.3, and the ways to make one.

Invariant: what is not a field is kept as an extra field, here and through the store. Importable without
OpenTelemetry: its objects are only read. How spans are stored is ``store.schema``'s.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from lightning_ray.semconv import AGL_VIRTUAL

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event as OtelEvent
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Link as OtelLink
    from opentelemetry.trace import SpanContext as OtelSpanContext
    from opentelemetry.trace import Status

StatusCode = Literal["UNSET", "OK", "ERROR"]
Attributes = dict[str, Any]
"""By convention strings, booleans, numbers and lists of them; what msgpack can hold is stored."""
TraceState = dict[str, str]

_NANOSECONDS_FROM = 1e12
"""Larger times are nanoseconds: as seconds they would be 30,000 years away."""


class SpanPart(BaseModel):
    """A piece of a span; unknown fields are kept."""

    model_config = ConfigDict(extra="allow")


class SpanContext(SpanPart):
    """Which span, in which trace; ids in hex."""

    trace_id: str
    span_id: str
    is_remote: bool = False
    trace_state: TraceState = Field(default_factory=dict)

    @classmethod
    def from_opentelemetry(cls, src: OtelSpanContext) -> Self:
        """The same of OpenTelemetry's API."""
        return cls(
            trace_id=trace_id_hex(src.trace_id),
            span_id=span_id_hex(src.span_id),
            is_remote=src.is_remote,
            trace_state=dict(src.trace_state.items()) if src.trace_state else {},
        )


class TraceStatus(SpanPart):
    """How a span ended, in OpenTelemetry's terms."""

    status_code: StatusCode = "UNSET"
    description: str | None = None

    @classmethod
    def from_opentelemetry(cls, src: Status) -> Self:
        """The same of OpenTelemetry's API."""
        return cls.model_validate({"status_code": src.status_code.name, "description": src.description})


SpanStatus = TraceStatus


class Event(SpanPart):
    """Something that happened within a span, at a time in Unix seconds."""

    name: str
    attributes: Attributes = Field(default_factory=dict)
    timestamp: float | None = None

    @classmethod
    def from_opentelemetry(cls, src: OtelEvent) -> Self:
        """The same of OpenTelemetry's SDK."""
        return cls(name=src.name, attributes=_plain(src.attributes), timestamp=convert_timestamp(src.timestamp))


class Link(SpanPart):
    """A pointer to a span of this or another trace."""

    context: SpanContext
    attributes: Attributes | None = None

    @classmethod
    def from_opentelemetry(cls, src: OtelLink) -> Self:
        """The same of OpenTelemetry's API."""
        return cls(context=SpanContext.from_opentelemetry(src.context), attributes=_plain(src.attributes) or None)


class OtelResource(SpanPart):
    """Who produced a span, as OpenTelemetry has it; not what an algorithm tunes (``types.Resource``)."""

    attributes: Attributes = Field(default_factory=dict)
    schema_url: str = ""

    @classmethod
    def from_opentelemetry(cls, src: Resource) -> Self:
        """The same of OpenTelemetry's SDK."""
        return cls(attributes=_plain(src.attributes), schema_url=src.schema_url or "")


class SpanCoreFields(BaseModel):
    """What there is to say of a span before it has its ids."""

    name: str
    status: TraceStatus = Field(default_factory=TraceStatus)
    attributes: Attributes = Field(default_factory=dict)
    start_time: float | None = None
    end_time: float | None = None


class Span(SpanPart):
    """One recorded event or operation of an attempt. Times are Unix seconds.

    Equal spans have equal fields and extra fields. A ``sequence_id`` of 0 asks the store for the next number.
    """

    rollout_id: str
    attempt_id: str
    sequence_id: int
    trace_id: str
    span_id: str
    parent_id: str | None = None
    name: str
    status: TraceStatus = Field(default_factory=TraceStatus)
    attributes: Attributes = Field(default_factory=dict)
    events: list[Event] = Field(default_factory=list)
    links: list[Link] = Field(default_factory=list)
    start_time: float | None = None
    end_time: float | None = None
    context: SpanContext | None = None
    parent: SpanContext | None = None
    resource: OtelResource = Field(default_factory=OtelResource)

    @classmethod
    def from_opentelemetry(cls, src: ReadableSpan, rollout_id: str, attempt_id: str, sequence_id: int) -> Self:
        """A span of OpenTelemetry's SDK; its kind and instrumentation scope are kept as extra fields."""
        context, scope = src.get_span_context(), src.instrumentation_scope
        extra: dict[str, Any] = {"kind": src.kind.name}
        if scope is not None and scope.name:
            extra["instrumentation_scope"] = instrumentation_scope(scope.name, scope.version)
        return cls(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=sequence_id,
            trace_id=trace_id_hex(context.trace_id if context else 0),
            span_id=span_id_hex(context.span_id if context else 0),
            parent_id=span_id_hex(src.parent.span_id) if src.parent else None,
            name=src.name,
            status=TraceStatus.from_opentelemetry(src.status),
            attributes=_plain(src.attributes),
            events=[Event.from_opentelemetry(event) for event in src.events],
            links=[Link.from_opentelemetry(link) for link in src.links],
            start_time=convert_timestamp(src.start_time),
            end_time=convert_timestamp(src.end_time),
            context=SpanContext.from_opentelemetry(context) if context else None,
            parent=SpanContext.from_opentelemetry(src.parent) if src.parent else None,
            resource=OtelResource.from_opentelemetry(src.resource),
            **extra,
        )

    @classmethod
    def from_attributes(
        cls,
        *,
        attributes: Attributes,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        sequence_id: int | None = None,
        name: str | None = None,
        trace_id: str | None = None,
        span_id: str | None = None,
        parent_id: str | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        resource: OtelResource | None = None,
        status: TraceStatus | None = None,
    ) -> Self:
        """A span that no tracer made. Ids of trace and span are drawn if they are not given."""
        trace_id = trace_id or secrets.token_hex(16)
        span_id = span_id or secrets.token_hex(8)
        return cls(
            rollout_id=rollout_id or "",
            attempt_id=attempt_id or "",
            sequence_id=sequence_id or 0,
            trace_id=trace_id,
            span_id=span_id,
            parent_id=parent_id,
            name=name or AGL_VIRTUAL,
            status=status or TraceStatus(status_code="OK"),
            attributes=attributes,
            start_time=start_time,
            end_time=end_time,
            context=SpanContext(trace_id=trace_id, span_id=span_id),
            parent=SpanContext(trace_id=trace_id, span_id=parent_id) if parent_id else None,
            resource=resource or OtelResource(),
        )

    @classmethod
    def from_core_fields(
        cls,
        core: SpanCoreFields,
        *,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        sequence_id: int | None = None,
    ) -> Self:
        """A span with new ids; it starts now if ``core`` does not say when."""
        return cls.from_attributes(
            attributes=core.attributes,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=sequence_id,
            name=core.name,
            start_time=core.start_time or time.time(),
            end_time=core.end_time,
            status=core.status,
        )


def trace_id_hex(trace_id: int) -> str:
    """A trace id as 32 hex digits."""
    return f"{trace_id:032x}"


def span_id_hex(span_id: int) -> str:
    """A span id as 16 hex digits."""
    return f"{span_id:016x}"


def convert_timestamp(timestamp: float | None) -> float | None:
    """A time in nanoseconds (or already in seconds) as seconds; None and 0 are no time."""
    if not timestamp:
        return None
    return timestamp / 1_000_000_000 if timestamp > _NANOSECONDS_FROM else timestamp


def instrumentation_scope(name: str, version: str | None) -> dict[str, str]:
    """The extra field that says which library made a span."""
    return {"name": name, "version": version} if version else {"name": name}


def _plain(attributes: Mapping[str, Any] | None) -> Attributes:
    """OpenTelemetry's attributes, sequences as lists: as they come back from a store."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in (attributes or {}).items()}
