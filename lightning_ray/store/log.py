"""The append-only log of a store: numbered files of checksummed records, and its replay.

A record is a list of events (msgpack) and, if there are spans, one Arrow IPC message; it survives whole or
not at all. What was written before a sync survives the machine, what was written at all survives the process.
Replay ends at a torn tail, which it cuts off and reports; damage to acknowledged records is an error, never a
silent loss. What events mean is left to the lifecycle. One process writes, under a lock on the folder; others
may read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store import frames
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.schema import SCHEMA_VERSION, SPAN_SCHEMA
from lightning_ray.store.sealed import sync_folder

Fsync = Literal["group", "none"]
Event = dict[str, Any]
_FORMAT = "lightning-ray span log"


@dataclass(frozen=True, slots=True)
class BodyRef:
    """Where a record's Arrow message lies: file number, offset and length in bytes."""

    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Record:
    """One replayed record, and the number of its file."""

    number: int
    events: list[Event]
    body: BodyRef | None


def log_path(folder: Path, number: int) -> Path:
    """The log file of that number."""
    return folder / "log" / f"{number:08d}.log"


def log_numbers(folder: Path) -> list[int]:
    """The numbers of the folder's log files, ascending."""
    return sorted(int(path.stem) for path in (folder / "log").glob("*.log"))


def read_log(folder: Path, notes: list[str], repair: bool, numbers: Sequence[int] | None = None) -> Iterator[Record]:
    """Replay all whole records in order, of all files or those of the given ``numbers``, the last included.

    What a torn tail lost is told in ``notes``; ``repair`` cuts it off. Raises StoreError if a record that had
    been acknowledged is damaged, or a file is of another version.
    """
    numbers = log_numbers(folder) if numbers is None else numbers
    for number in numbers:
        path = log_path(folder, number)
        size = path.stat().st_size
        data = _map(path, size)
        end = 0
        for frame in frames.frames(data):
            end = frame.end
            if frame.kind == frames.FILE_HEADER:
                _check_header(path, unpack(frame.head))
                continue
            body = BodyRef(number, frame.body_offset, frame.body_length) if frame.body_length else None
            yield Record(number, unpack(frame.head), body)
        if end == size:
            continue
        if number != numbers[-1] or frames.was_acknowledged(data, end):
            raise StoreError(
                f"{path}: the record at byte {end} is damaged, and it was acknowledged; restore the file "
                f"from a copy, or give up all from there on: `truncate -s {end} {path}`, remove later files"
            )
        notes.append(f"{path}: {size - end} bytes of an unfinished record at byte {end} were dropped")
        if repair:
            os.truncate(path, end)


class LogWriter:
    """Appends records to the last file of a log, and starts the next one by size.

    Of one thread, but for sync jobs, which may run in any.
    """

    def __init__(self, folder: Path, fsync: Fsync, file_bytes: int, number: int = 1) -> None:
        if fsync not in ("group", "none"):
            raise StoreError(f"fsync is {fsync!r}; it must be 'group' or 'none'")
        self.records = 0
        """Records appended by this writer."""
        self._folder, self._fsync, self._file_bytes = folder, fsync, file_bytes
        self._failure: OSError | None = None
        self._number = max(log_numbers(folder), default=number)
        self._size = 0
        self._synced = (self._number, 0)
        self._open()

    def append(self, events: list[Event], body: pa.Buffer | None = None) -> BodyRef | None:
        """Write one record; it is durable against the death of this process, and after a sync against more.

        Returns where the body lies. Raises InfrastructureError if the disk refuses, then and ever after.
        """
        self._check()
        head = pack(events, "a record of the store")
        if self._size >= self._file_bytes:
            self._rotate()
        offset = self._write(frames.ENTRY, head, memoryview(body) if body else None)
        self.records += 1
        return BodyRef(self._number, offset, body.size) if body else None

    @property
    def number(self) -> int:
        """The number of the file that is written."""
        return self._number

    @property
    def has_records(self) -> bool:
        """Whether there are records in the file that is written."""
        return self._size > self._header_bytes

    def rotate(self) -> None:
        """Close the file and go on in the next. Raises InfrastructureError if the disk refuses."""
        self._check()
        self._rotate()

    def sync_job(self) -> Callable[[], None] | None:
        """What makes all appended so far durable, to be called once, in any thread; None if it is."""
        self._check()
        if self._synced == (self._number, self._size):
            return None
        number, size, fd = self._number, self._size, os.dup(self._fd)

        def job() -> None:
            try:
                os.fdatasync(fd)
            except OSError as error:
                self._failure = error
                self._check()
            finally:
                os.close(fd)
            self._synced = max(self._synced, (number, size))

        return job

    def sync(self) -> None:
        """Make all that was appended so far durable."""
        job = self.sync_job()
        if job is not None:
            job()

    def close(self) -> None:
        """Sync, unless the disk had failed, and close the file."""
        if self._failure is None:
            self.sync()
        os.close(self._fd)

    def remove(self) -> None:
        """Remove the file that was written, after it was closed; for one without records."""
        log_path(self._folder, self._number).unlink()

    def _open(self) -> None:
        path = log_path(self._folder, self._number)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._fd).st_size
        head = pack(_header(), "the log's header")
        self._header_bytes = frames.size_of(head)
        if not self._size:
            self._write(frames.FILE_HEADER, head, None)
        if self._fsync == "group":
            os.fsync(self._fd)
            sync_folder(path.parent)
        self._synced = (self._number, self._size)

    def _rotate(self) -> None:
        self.sync()
        os.close(self._fd)
        self._number += 1
        self._open()

    def _write(self, kind: int, head: bytes, body: memoryview | None) -> int:
        number, synced = self._synced
        acknowledged = synced if number == self._number else 0
        buffers, body_start = frames.pack_frame(kind, acknowledged, head, body)
        start = self._size
        try:
            self._size += _write_all(self._fd, buffers)
        except OSError as error:
            self._failure = error
            self._check()
        if self._fsync == "none":
            self._synced = (self._number, self._size)
        return start + body_start

    def _check(self) -> None:
        if self._failure is not None:
            raise InfrastructureError(
                f"the span store cannot write {log_path(self._folder, self._number)}: {self._failure}; what "
                "it acknowledged is safe. Free space or mend the disk, then start it again"
            ) from self._failure


class BodyReader:
    """Reads record bodies in place, from memory maps of the log files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[int, pa.MemoryMappedFile] = {}

    def open(self, number: int) -> pa.MemoryMappedFile:
        """A log file, as long as it was when it was first asked for."""
        mapped = self._maps.get(number)
        if mapped is None:
            mapped = self._maps[number] = pa.memory_map(str(log_path(self._folder, number)))
        return mapped

    def read(self, ref: BodyRef) -> pa.Buffer:
        """The bytes of a body, not copied."""
        mapped = self.open(ref.number)
        mapped.seek(ref.offset)
        return mapped.read_buffer(ref.length)


def _map(path: Path, size: int) -> memoryview:
    return memoryview(pa.memory_map(str(path)).read_buffer(size)) if size else memoryview(b"")


def _header() -> dict[str, Any]:
    return {"format": _FORMAT, "spans": SCHEMA_VERSION, "schema": SPAN_SCHEMA.serialize().to_pybytes()}


def _check_header(path: Path, header: dict[str, Any]) -> None:
    if header.get("format") != _FORMAT or header.get("spans") != SCHEMA_VERSION:
        raise StoreError(
            f"{path} is a log of version {header.get('spans')}; this lightning-ray reads version {SCHEMA_VERSION}. "
            "Read it with the lightning-ray that wrote it, or give the run another name"
        )


def _write_all(fd: int, buffers: list[bytes | memoryview]) -> int:
    total = sum(memoryview(buffer).nbytes for buffer in buffers)
    written = os.writev(fd, buffers)
    while written < total:
        rest = memoryview(b"".join(buffers))[written:]
        written += os.write(fd, rest)
    return total
