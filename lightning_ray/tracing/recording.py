"""A span in the making, as a tracer's ``operation_context`` gives it: on OpenTelemetry, or on nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lightning_ray.otel import format_exception_attributes
from lightning_ray.span import Attributes, SpanCoreFields, StatusCode, TraceStatus, convert_timestamp

if TYPE_CHECKING:
    from opentelemetry import trace as api


class SpanRecordingContext(Protocol):
    """What can be said of a span while it lasts."""

    def record_exception(self, exception: BaseException) -> None:
        """The operation failed with it."""

    def record_attributes(self, attributes: Attributes) -> None:
        """Add or replace attributes."""

    def record_status(self, status_code: StatusCode, description: str | None = None) -> None:
        """How it went."""

    def get_recorded_span(self) -> SpanCoreFields:
        """The span. Raises ValueError before it has ended."""


class OtelSpanRecordingContext:
    """On a span of OpenTelemetry's SDK."""

    def __init__(self, span: api.Span):
        self._span = span

    def record_exception(self, exception: BaseException) -> None:
        """An event with the exception; the status is ERROR."""
        self._span.record_exception(exception)
        self.record_status("ERROR", str(exception))

    def record_attributes(self, attributes: Attributes) -> None:
        """Add or replace attributes."""
        self._span.set_attributes(attributes)

    def record_status(self, status_code: StatusCode, description: str | None = None) -> None:
        """How it went; OpenTelemetry keeps descriptions of errors only."""
        from opentelemetry.trace import StatusCode as OtelStatusCode

        self._span.set_status(OtelStatusCode[status_code], description if status_code == "ERROR" else None)

    def get_otel_span(self) -> api.Span:
        """The span itself."""
        return self._span

    def get_recorded_span(self) -> SpanCoreFields:
        """The span. Raises ValueError if OpenTelemetry did not record it, or it has not ended."""
        from opentelemetry.sdk.trace import ReadableSpan

        from lightning_ray.tracing.rows import plain_attributes

        if not isinstance(self._span, ReadableSpan) or self._span.end_time is None:
            raise ValueError(f"the span is not recorded or has not ended: {self._span}")
        return SpanCoreFields(
            name=self._span.name,
            status=TraceStatus.from_opentelemetry(self._span.status),
            attributes=plain_attributes(self._span.attributes),
            start_time=convert_timestamp(self._span.start_time),
            end_time=convert_timestamp(self._span.end_time),
        )


class DummySpanRecordingContext:
    """On nothing: the span is given back and goes nowhere."""

    def __init__(self, name: str, attributes: Mapping[str, Any] | None = None, start_time: float | None = None):
        self.name = name
        self.attributes = dict(attributes or {})
        self.start_time = start_time if start_time is not None else time.time()
        self.end_time: float | None = None
        self.status = TraceStatus(status_code="OK")

    def record_exception(self, exception: BaseException) -> None:
        """Attributes with the exception; the status is ERROR."""
        self.record_attributes(format_exception_attributes(exception))
        self.record_status("ERROR", str(exception))

    def record_attributes(self, attributes: Attributes) -> None:
        """Add or replace attributes."""
        self.attributes.update(attributes)

    def record_status(self, status_code: StatusCode, description: str | None = None) -> None:
        """How it went."""
        self.status = TraceStatus(status_code=status_code, description=description)

    def finalize(self, end_time: float | None = None) -> None:
        """End it."""
        self.end_time = end_time if end_time is not None else time.time()

    def get_recorded_span(self) -> SpanCoreFields:
        """The span. Raises ValueError before ``finalize``."""
        if self.end_time is None:
            raise ValueError(f"span {self.name!r} has not ended")
        return SpanCoreFields(
            name=self.name,
            status=self.status,
            attributes=self.attributes,
            start_time=self.start_time,
            end_time=self.end_time,
        )
