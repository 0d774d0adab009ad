"""Objects that an agent leaves in its trace: primitives and bytes as text, anything else as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from lightning_ray.emitter.recorder import extra_attributes, recorder
from lightning_ray.otel import full_qualified_name
from lightning_ray.semconv import AGL_OBJECT, LightningSpanAttributes
from lightning_ray.span import Attributes, SpanCoreFields, TraceStatus

_TYPE = LightningSpanAttributes.OBJECT_TYPE.value
_LITERAL = LightningSpanAttributes.OBJECT_LITERAL.value
_JSON = LightningSpanAttributes.OBJECT_JSON.value
_READ: Mapping[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda literal: literal.lower() == "true",
    "bytes": lambda literal: base64.b64decode(literal.encode()),
}


def emit_object(object: Any, attributes: Mapping[str, Any] | None = None, propagate: bool = True) -> SpanCoreFields:
    """Record an object of the running rollout. Raises RuntimeError for one that JSON cannot express."""
    return recorder("the object", propagate).create_span(
        AGL_OBJECT,
        attributes={**encode_object(object), **extra_attributes(attributes)},
        status=TraceStatus(status_code="OK"),
    )


def encode_object(object: Any) -> Attributes:
    """The object as attributes. Raises RuntimeError for one that JSON cannot express."""
    if isinstance(object, bytes):
        return {_TYPE: "bytes", _LITERAL: base64.b64encode(object).decode()}
    if type(object) in (str, int, float, bool):
        return {_TYPE: type(object).__name__, _LITERAL: str(object)}
    try:
        return {_TYPE: full_qualified_name(type(object)), _JSON: json.dumps(object)}
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f"an object of type {full_qualified_name(type(object))} cannot be emitted: {error}; emit what JSON can "
            "express, model_dump() of a pydantic model for example"
        ) from error


def get_object_value(span: Any) -> Any:
    """The object of a span, None if it has none. Raises RuntimeError if it cannot be read."""
    attributes = span.attributes or {}
    if (serialized := attributes.get(_JSON)) is not None:
        try:
            return json.loads(serialized)
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"attribute {_JSON!r} is no JSON: {serialized!r:.80}") from error
    if (literal := attributes.get(_LITERAL)) is None:
        return None
    kind = attributes.get(_TYPE, "str")
    if kind not in _READ:
        raise RuntimeError(f"attribute {_TYPE!r} is {kind!r}; a literal is one of {sorted(_READ)}")
    return _READ[kind](literal)
