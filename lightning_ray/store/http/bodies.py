"""Request bodies and answers: JSON for everyone, msgpack between our own, Arrow streams for spans.

Invariant: nothing larger than the limit is held, compressed or not, and what is not understood ends in a Refusal
that says why. What the bodies mean is ``app``'s and ``otlp``'s business.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response

from lightning_ray.errors import StoreError
from lightning_ray.store.foreign import conform
from lightning_ray.store.http.media import ARROW, JSON, MSGPACK, plain
from lightning_ray.store.packing import pack, unpack_foreign
from lightning_ray.store.schema import encode_table

MAX_BODY_BYTES = 64 * 2**20
"""Default limit of a request body, compressed and not."""
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""How zlib is told which header to expect."""


class Refusal(Exception):
    """An answer other than success, in plain words."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def media_type(request: Request) -> str:
    """The request's content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limit: int) -> bytes:
    """The body, unzipped. Raises Refusal 413 if it is larger than ``limit`` bytes, 400 or 415 if it cannot be read."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    body = b"".join(parts)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise Refusal(415, f"Content-Encoding {encoding!r} is not understood; send gzip, deflate or none")
    return unzip(body, encoding, limit)


def unzip(body: bytes, encoding: str, limit: int) -> bytes:
    """Unzip at most ``limit`` bytes; more are refused without being unzipped."""
    parts, left, rest = [], limit, body
    while rest:
        member = zlib.decompressobj(_WINDOW_BITS[encoding])
        try:
            part = member.decompress(rest, left + 1)
        except zlib.error as error:
            raise Refusal(400, f"the body is not {encoding}: {error}") from error
        left -= len(part)
        if left < 0:
            raise _too_large(limit, " when unzipped")
        if not member.eof:
            raise Refusal(400, f"the {encoding} body ends too early")
        parts.append(part)
        rest = member.unused_data
    return b"".join(parts)


def decode(body: bytes, content_type: str) -> Any:
    """The data of a JSON or msgpack body; no body is None. Raises Refusal 400 if it is neither."""
    if not body:
        return None
    try:
        return unpack_foreign(body) if content_type == MSGPACK else from_json(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not {content_type or JSON}: {error}") from error


def decode_arrow(body: bytes) -> pa.RecordBatch:
    """The spans of an Arrow IPC stream, all checked. Raises Refusal 400, or StoreError naming the column."""
    try:
        if any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(body)):
            raise Refusal(415, "the Arrow stream has compressed buffers; write it without compression, gzip the body")
        return conform(pa.ipc.open_stream(body).read_all())
    except StoreError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, struct.error) as error:
        raise Refusal(400, f"the body is not a stream of Arrow's IPC format: {error}") from error


def answer(request: Request, value: Any, status: int = 200) -> Response:
    """A value in the form that the request accepts: msgpack if it says so, Arrow for tables, else JSON."""
    accepted = request.headers.get("accept", "")
    if isinstance(value, pa.Table):
        if ARROW in accepted:
            return Response(encode_table(value).to_pybytes(), status, media_type=ARROW)
        value = {"columns": value.column_names, "rows": [list(row.values()) for row in value.to_pylist()]}
    value = plain(value)
    if MSGPACK in accepted:
        return Response(pack(value, "the answer"), status, media_type=MSGPACK)
    content = to_json(value, inf_nan_mode="null", bytes_mode="base64", serialize_unknown=True)
    return Response(content, status, media_type=JSON)


def refusal_answer(refusal: Refusal) -> Response:
    """``{"detail": ...}``."""
    return Response(to_json({"detail": refusal.detail}), refusal.status, refusal.headers, media_type=JSON)


def _too_large(limit: int, when: str = "") -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes{when}; send less at once")


def _is_compressed(message: pa.ipc.Message) -> bool:
    """Whether a record batch's header (a flatbuffer: Message, field 2; RecordBatch, field 3) has a compression."""
    if message.type != "record batch":
        return False
    data = message.metadata.to_pybytes()
    root = struct.unpack_from("<I", data, 0)[0]
    header = _flatbuffer_field(data, root, 2)
    batch = header + struct.unpack_from("<I", data, header)[0]
    return _flatbuffer_field(data, batch, 3) != 0


def _flatbuffer_field(data: bytes, table: int, field: int) -> int:
    """Where a field of the table at ``table`` lies; 0 if it is not set."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 4 + 2 * field >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * field)[0]
    return table + offset if offset else 0
