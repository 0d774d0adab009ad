"""What a runner and a child of it say to each other: frames of a kind, a length and a body.

To the child, whom the agent controls, go pickles; from it comes msgpack alone, which can do nothing but be wrong.
"""

from __future__ import annotations

import struct
from asyncio import StreamReader
from typing import Any, BinaryIO

import msgpack

from lightning_ray.errors import StoreError

AGENT, PLAY = b"A", b"P"
"""To the child: the agent, once; an attempt."""
READY, REFUSED, SPAN, END = b"R", b"F", b"S", b"E"
"""From the child: it has the agent, or cannot have it, and why; a span of the attempt; how the attempt ended."""

_HEAD = struct.Struct(">cI")
MAX_BODY = 2**30


def frame(kind: bytes, body: bytes = b"") -> bytes:
    """A frame."""
    return _HEAD.pack(kind, len(body)) + body


def read_frame(line: BinaryIO) -> tuple[bytes, bytes]:
    """The next kind and body. Raises EOFError at the end."""
    head = _exactly(line, _HEAD.size)
    kind, length = _HEAD.unpack(head)
    return kind, _exactly(line, length)


async def receive_frame(line: StreamReader) -> tuple[bytes, bytes]:
    """The next kind and body. Raises EOFError at the end, ValueError for what is no frame."""
    kind, length = _HEAD.unpack(await line.readexactly(_HEAD.size))
    if kind not in (READY, REFUSED, SPAN, END) or length > MAX_BODY:
        raise ValueError(f"a frame of kind {kind!r} and {length} bytes")
    return kind, await line.readexactly(length)


def packed(value: Any, what: str) -> bytes:
    """A body. Raises StoreError for what a store cannot hold either; here, so that a child need not import a store."""
    try:
        data: bytes = msgpack.packb(value, default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{what} cannot be stored: {error}; use what JSON can hold (or bytes)") from error
    return data


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):  # numpy's
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__module__}.{type(value).__qualname__}")


def _exactly(line: BinaryIO, length: int) -> bytes:
    data = line.read(length)
    if len(data) < length:
        raise EOFError
    return data
