"""Text that an agent leaves in its trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.emitter.recorder import extra_attributes, recorder
from lightning_ray.semconv import AGL_MESSAGE, LightningSpanAttributes
from lightning_ray.span import SpanCoreFields

_BODY = LightningSpanAttributes.MESSAGE_BODY.value


def emit_message(message: str, attributes: Mapping[str, Any] | None = None, propagate: bool = True) -> SpanCoreFields:
    """Record a message of the running rollout. Raises TypeError for anything but text."""
    if not isinstance(message, str):
        raise TypeError(f"a message is text, got {type(message).__name__} {message!r:.80}; emit_object() takes others")
    return recorder("the message", propagate).create_span(
        AGL_MESSAGE, attributes={_BODY: message, **extra_attributes(attributes)}
    )


def get_message_value(span: Any) -> str | None:
    """The message of a span, None if it has none. Raises TypeError if it is no text."""
    message = (span.attributes or {}).get(_BODY)
    if message is not None and not isinstance(message, str):
        raise TypeError(f"attribute {_BODY!r} is {type(message).__name__} {message!r:.80}; it must be text")
    return message
