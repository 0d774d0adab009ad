"""Exceptions that an agent met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.emitter.recorder import extra_attributes, recorder
from lightning_ray.otel import format_exception_attributes
from lightning_ray.semconv import AGL_EXCEPTION
from lightning_ray.span import SpanCoreFields, TraceStatus


def emit_exception(
    exception: BaseException, attributes: Mapping[str, Any] | None = None, propagate: bool = True
) -> SpanCoreFields:
    """Record an exception of the running rollout, with its stack. Raises TypeError for anything else."""
    if not isinstance(exception, BaseException):
        raise TypeError(f"an exception is emitted, got {type(exception).__name__} {exception!r:.80}")
    return recorder("the exception", propagate).create_span(
        AGL_EXCEPTION,
        attributes={**format_exception_attributes(exception), **extra_attributes(attributes)},
        status=TraceStatus(status_code="ERROR", description=str(exception)),
    )
