"""Key-value pairs about the running rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.emitter.recorder import recorder
from lightning_ray.otel import check_attributes_sanity, flatten_attributes, sanitize_attributes
from lightning_ray.semconv import AGL_ANNOTATION
from lightning_ray.span import SpanCoreFields, TraceStatus


def emit_annotation(annotation: Mapping[str, Any], propagate: bool = True) -> SpanCoreFields:
    """Record key-value pairs about the running rollout; nested ones are flattened with dots.

    A numeric value is averaged by its key over a validation and shows up in the run's summary. Raises ValueError for
    a value that an attribute cannot hold.
    """
    attributes = flatten_attributes(annotation)
    check_attributes_sanity(attributes)
    return recorder("the annotation", propagate).create_span(
        AGL_ANNOTATION, attributes=sanitize_attributes(attributes), status=TraceStatus(status_code="OK")
    )
