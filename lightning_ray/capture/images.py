"""Images in a request by reference: a span keeps an image's digest, and the attempt keeps the image once.

``image:sha256:DIGEST;MEDIA_TYPE;BYTES`` stands for an image that was sent inline; one that was sent by URL is a
reference already. The bytes are in a span of the same attempt (``semconv.IMAGE_SPAN``) whose attributes have
``sha256``, ``media_type`` and ``data``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

REFERENCE = "image:sha256:"
MARK = b"base64"
"""Without it a body holds no inline image."""


class Image(NamedTuple):
    """One inline image."""

    sha256: str
    media_type: str
    data: bytes

    @property
    def reference(self) -> str:
        """What stands for it."""
        return f"{REFERENCE}{self.sha256};{self.media_type};{len(self.data)}"


def by_reference(value: Any) -> tuple[Any, list[Image]]:
    """A JSON value with each inline image (a data URL, or Anthropic's base64 source) as its reference; the images."""
    images: list[Image] = []
    return _walk(value, images), images


def _walk(value: Any, images: list[Image]) -> Any:
    if isinstance(value, list):
        return [_walk(item, images) for item in value]
    if isinstance(value, Mapping):
        if value.get("type") == "base64" and str(value.get("media_type", "")).startswith("image/"):
            image = _image(str(value["media_type"]), str(value.get("data", "")))
            if image is not None:
                images.append(image)
                return {**value, "data": image.reference}
        return {key: _walk(item, images) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("data:image/"):
        head, _, data = value.partition(";base64,")
        image = _image(head.removeprefix("data:"), data)
        if image is not None:
            images.append(image)
            return image.reference
    return value


def _image(media_type: str, data: str) -> Image | None:
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return None  # the app says what is wrong with it
    return Image(hashlib.sha256(raw).hexdigest(), media_type, raw) if raw else None
