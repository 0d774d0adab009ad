"""msgpack with the few conversions that tasks and span attributes need.

What is packed comes back as plain data: tuples as lists, numpy scalars as Python numbers, numpy arrays as
lists, pydantic models as dicts. Anything else that msgpack cannot hold is refused by name, never pickled.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
from pydantic import BaseModel

from lightning_ray.errors import StoreError
from lightning_ray.span import SpanPart


def pack(value: Any, what: str) -> bytes:
    """msgpack bytes of a value; ``what`` names it in the StoreError raised when it cannot be stored."""
    try:
        return msgpack.packb(value, default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{what} cannot be stored: {error}; use what JSON can hold (or bytes)") from error


def unpack(data: bytes | memoryview) -> Any:
    """The value that ``pack`` was given, as plain data."""
    return msgpack.unpackb(data, strict_map_key=False)


def unpack_foreign(data: bytes | memoryview) -> Any:
    """As ``unpack``, for bytes that others made. Raises ValueError for all that is no msgpack, or has extension
    types, which ``pack`` never makes.
    """
    try:
        return msgpack.unpackb(data, strict_map_key=False, ext_hook=_refuse_extension)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"it has an extension type ({code})")


def _plain(value: Any) -> Any:
    if isinstance(value, SpanPart):
        return {**value.__dict__, **(value.__pydantic_extra__ or {})}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"a value of type {type(value).__module__}.{type(value).__qualname__}")
