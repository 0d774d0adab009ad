"""How one record lies in a log file: a frame with a checksum, and the way to find where whole frames end.

    crc32 u32 | length u32 | head length u32 | kind u8, 3 zeros | acknowledged u64 | head, zeros | body, zeros

``length`` counts head, its zeros and body; the checksum covers all behind it. Zeros fill up to multiples
of 8, so that Arrow reads bodies in place. ``acknowledged`` is how many bytes of this file were
known to be durable when the frame was written: it tells a torn tail, which nobody was promised, from damage
to what somebody was. What heads and bodies mean is left to others.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = struct.Struct("<IIIB3xQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size
FILE_HEADER = 0
ENTRY = 1


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame; offsets and lengths in bytes, in its file."""

    kind: int
    offset: int
    head: memoryview
    body_offset: int
    body_length: int
    acknowledged: int
    end: int


def padding(length: int) -> int:
    """Zeros from ``length`` to the next multiple of 8."""
    return -length % 8


def pack_frame(
    kind: int, acknowledged: int, head: bytes, body: memoryview | None
) -> tuple[list[bytes | memoryview], int]:
    """The buffers of a frame, to be written one after the other, and the body's offset from the frame's
    start.
    """
    gap = bytes(padding(len(head)))
    body = memoryview(b"") if body is None else body
    length = len(head) + len(gap) + body.nbytes
    rest = _HEADER.pack(0, length, len(head), kind, acknowledged)[_CRC.size :]
    crc = zlib.crc32(rest)
    for part in (head, gap, body):
        crc = zlib.crc32(part, crc)
    return [_CRC.pack(crc), rest, head, gap, body, bytes(padding(length))], HEADER_BYTES + len(head) + len(gap)


def size_of(head: bytes) -> int:
    """The bytes of a frame without a body."""
    length = len(head) + padding(len(head))
    return HEADER_BYTES + length


def frame_at(data: memoryview, offset: int) -> Frame | None:
    """The frame that starts at ``offset``, or None if no whole one does."""
    if offset + HEADER_BYTES > len(data):
        return None
    crc, length, head_length, kind, acknowledged = _HEADER.unpack_from(data, offset)
    start, stop = offset + HEADER_BYTES, offset + HEADER_BYTES + length
    end = stop + padding(length)
    if kind > ENTRY or head_length > length or end > len(data):
        return None
    if zlib.crc32(data[offset + _CRC.size : stop]) != crc:
        return None
    body_offset = min(start + head_length + padding(head_length), stop)
    return Frame(kind, offset, data[start : start + head_length], body_offset, stop - body_offset, acknowledged, end)


def frames(data: memoryview) -> Iterator[Frame]:
    """The whole frames from the start of a file, up to the first that is not."""
    offset = 0
    while (frame := frame_at(data, offset)) is not None:
        yield frame
        offset = frame.end


def was_acknowledged(data: memoryview, offset: int) -> bool:
    """Whether a later frame shows that the broken one at ``offset`` had been acknowledged."""
    later = offset + 8
    while later + HEADER_BYTES <= len(data):
        frame = frame_at(data, later)
        if frame is not None and frame.acknowledged > offset:
            return True
        later = later + 8 if frame is None else frame.end
    return False
