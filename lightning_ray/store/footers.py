"""The footer of a Parquet file taken apart, so that one row group can be read without parsing all of them.

A footer is a Thrift struct (compact protocol) of which field 4 is the list of row groups. Between what stands
before and behind that list, any single element makes a footer of its own: ``metadata_of``. Only lengths are
parsed here; what the fields mean is Parquet's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = b"PAR1"
_ROW_GROUPS = 4
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_FIXED = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}
_ONE_STRUCT = bytes([1 << 4 | _STRUCT])


@dataclass(frozen=True, slots=True)
class Footer:
    """A footer's bytes before and behind its row groups, and where in the file each row group's lie."""

    start: int
    """Where the footer starts in the file."""
    head: bytes
    tail: bytes
    groups: list[tuple[int, int]]
    """Offset and length."""


def read_footer(file: BinaryIO) -> Footer:
    """The footer of a Parquet file."""
    end = file.seek(0, 2)
    file.seek(end - 8)
    length, magic = struct.unpack("<I4s", file.read(8))
    if magic != _MAGIC:
        raise ValueError("no Parquet file")
    start = end - 8 - length
    file.seek(start)
    data = file.read(length)
    at = field = 0
    while data[at] != _STOP:
        delta, kind = data[at] >> 4, data[at] & 15
        at += 1
        if delta:
            field += delta
        else:
            raw, at = _varint(data, at)
            field = raw >> 1 ^ -(raw & 1)
        if field == _ROW_GROUPS:
            break
        at = _skip(data, at, kind)
    head = data[:at]
    count, _, at = _list_header(data, at)
    groups = []
    for _ in range(count):
        stop = _skip(data, at, _STRUCT)
        groups.append((start + at, stop - at))
        at = stop
    return Footer(start, head, data[at:], groups)


def metadata_of(head: bytes, group: bytes, tail: bytes) -> pq.FileMetaData:
    """The metadata of a file as if it had only this row group; offsets are the file's."""
    footer = head + _ONE_STRUCT + group + tail
    return pq.read_metadata(pa.BufferReader(_MAGIC + footer + struct.pack("<I", len(footer)) + _MAGIC))


def _skip(data: bytes, at: int, kind: int) -> int:
    if kind in (_I32, _I64, _I16):
        while data[at] >= 0x80:
            at += 1
        return at + 1
    if kind == _BINARY:
        length = data[at]
        if length >= 0x80:
            length, at = _varint(data, at)
            return at + length
        return at + 1 + length
    if kind == _STRUCT:
        while (header := data[at]) != _STOP:
            at += 1
            if header < 16:
                at = _varint(data, at)[1]
            at = _skip(data, at, header & 15)
        return at + 1
    if kind in (_LIST, _SET):
        count, kind, at = _list_header(data, at)
        for _ in range(count):
            at = at + 1 if kind in (_TRUE, _FALSE) else _skip(data, at, kind)
        return at
    if kind in _FIXED:
        return at + _FIXED[kind]
    raise ValueError(f"a Parquet footer with a field of kind {kind}")


def _list_header(data: bytes, at: int) -> tuple[int, int, int]:
    """Number and kind of a list's elements, and where they start."""
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    return count, kind, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
