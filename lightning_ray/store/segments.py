"""Spans in their long-term form: a Parquet file that any reader opens, and beside it what finds rows in it.

Rollouts lie one after the other, each with its spans in order of arrival and sequence numbers filled in. A row
group holds some small rollouts or one large one. A column's part of it is one page, and token ids are split into
byte streams, so compression finds the prefix that a conversation's turns repeat and stores it once. The file
beside it (``.rollouts``) holds where rollouts lie, checksums, the rollouts that have ended, and ``carried``: what
was logged then about rollouts of earlier segments.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_ray.errors import StoreError
from lightning_ray.store.footers import metadata_of
from lightning_ray.store.log import Event
from lightning_ray.store.schema import SPAN_SCHEMA
from lightning_ray.store.sealed import read_sealed

if TYPE_CHECKING:
    import pyarrow.dataset as ds

PART = "lightning-ray segment"
_COUNT_BITS = 32
_OPEN_AT_ONCE = 512
_FIX = "restore it from a copy of the store's folder"


def parquet_path(folder: Path, stem: str) -> Path:
    """Where a segment's spans lie."""
    return folder / f"{stem}.parquet"


def part_path(folder: Path, stem: str) -> Path:
    """Where lies what belongs to a segment's spans."""
    return folder / f"{stem}.rollouts"


@dataclass(slots=True)
class Content:
    """What a segment is made of, but for its spans."""

    entries: list[tuple[str, int, bytes]] = field(default_factory=list)
    """Rollouts that have ended: id, serial and ``snapshot.pack_entry``."""
    statuses: dict[str, int] = field(default_factory=dict)
    attempts: int = 0
    carried: list[Event] = field(default_factory=list)


class Segment:
    """A segment for reading: where its rollouts lie. The rows are read from the file at each question."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.stem = stem
        self.path = parquet_path(folder, stem)
        self.part_path = part_path(folder, stem)
        part = read_sealed(self.part_path, PART)
        ids, counts = part["ids"], part["counts"]
        starts = accumulate(counts, initial=0)
        self.places: dict[str, int] = {
            rollout_id: start << _COUNT_BITS | count
            for rollout_id, start, count in zip(ids[: len(counts)], starts, counts, strict=False)
        }
        """First row and number of rows, by rollout; those that only ended here have none."""
        self.places.update(dict.fromkeys(ids[len(counts) :], 0))
        self.content = Content(
            [(ids[number], serial, packed) for number, serial, packed in part["entries"]],
            part["statuses"],
            part["attempts"],
            part["carried"],
        )
        self.rows = self.all_rows = sum(counts)
        """Rows of rollouts that were not dropped, and of all."""
        self.raw_bytes: int = part["raw_bytes"]
        """Bytes of all rows in memory."""
        self.dropped: set[str] = set()
        """Rollouts that were here and are deleted."""
        self.disk_bytes: int = part["footer"]["size"] + self.part_path.stat().st_size
        self._groups: list[tuple[int, ...]] = [tuple(group) for group in part["groups"]]
        self._ends = [end for end, *_ in self._groups]
        self._head: bytes = part["footer"]["head"]
        self._tail: bytes = part["footer"]["tail"]
        self._checked = bytearray(len(self._groups))
        self._last: tuple[int, pa.RecordBatch] | None = None
        size = self.path.stat().st_size
        if size != part["footer"]["size"]:
            raise StoreError(f"{self.path} has {size} bytes and was written with {part['footer']['size']}; {_FIX}")

    def let_go_of_content(self) -> None:
        """Forget what belongs to the spans, once it was read."""
        self.content = Content()

    def place(self, rollout_id: str) -> tuple[int, int] | None:
        """First row and number of rows of a rollout; None if it has no rows here."""
        place = self.places.get(rollout_id, 0)
        return (place >> _COUNT_BITS, place & (1 << _COUNT_BITS) - 1) if place else None

    def drop(self, rollout_id: str) -> None:
        """Forget a rollout; its rows stay in the file until that is rewritten."""
        place = self.places.pop(rollout_id, None)
        if place is not None:
            self.dropped.add(rollout_id)
            self.rows -= place & (1 << _COUNT_BITS) - 1

    def groups_of(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Where rows lie: number of the row group, first row in it, number of rows."""
        number = bisect_right(self._ends, start)
        while count > 0:
            before = self._ends[number - 1] if number else 0
            here = min(count, self._ends[number] - start)
            yield number, start - before, here
            start, count, number = start + here, count - here, number + 1

    def read_group(self, number: int, columns: list[str] | None, files: OpenFiles) -> pa.RecordBatch:
        """The rows of a row group, checked when they are read first. Raises StoreError if they are damaged."""
        _, offset, length, footer, footer_length, crc = self._groups[number]
        file = files.open(self.path)
        told = file.read_at(footer_length, footer)
        if not self._checked[number]:
            if zlib.crc32(told, zlib.crc32(file.read_at(length, offset))) != crc:
                raise StoreError(f"{self.path}: the spans at byte {offset} are damaged; {_FIX}")
            self._checked[number] = True
        metadata = metadata_of(self._head, told, self._tail)
        table = pq.ParquetFile(file, metadata=metadata).read_row_group(0, columns=columns, use_threads=False)
        return (table if columns is None else table.select(columns)).to_batches()[0]

    def batches(self, files: OpenFiles) -> Iterator[pa.RecordBatch]:
        """The rows of rollouts that were not dropped."""
        dropped = pa.array(sorted(self.dropped), pa.string())
        for number in range(len(self._groups)):
            batch = self.read_group(number, None, files)
            yield batch.filter(pc.invert(pc.is_in(batch["rollout_id"], dropped))) if self.dropped else batch

    def rows_of(self, rollout_id: str, files: OpenFiles) -> Iterator[pa.RecordBatch]:
        """A rollout's rows. Those of the row group read last are at hand."""
        for number, start, count in self.groups_of(*(self.place(rollout_id) or (0, 0))):
            if self._last is None or self._last[0] != number:
                self._last = number, self.read_group(number, None, files)
            yield self._last[1].slice(start, count)


class OpenFiles:
    """The files read last, at most ``limit``, kept open."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[Path, pa.OSFile] = OrderedDict()

    def open(self, path: Path) -> pa.OSFile:
        """The file for reading."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = pa.OSFile(str(path))
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(path)
        return file

    def close(self, path: Path) -> None:
        """Let go of a file."""
        self._files.pop(path, None)


def datasets(segments: Sequence[Segment]) -> list[ds.Dataset]:
    """The spans of segments for Arrow's query engines, without the dropped rollouts. The files are open, and
    may be removed meanwhile; of very many they are opened on reading.
    """
    import pyarrow.dataset as ds  # not above: it brings pandas in, if that is installed

    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    parquet = ds.ParquetFileFormat(default_fragment_scan_options=options)
    shown = [segment for segment in segments if segment.rows]
    whole = [segment for segment in shown if not segment.dropped]
    found = []
    for some in [whole, *([segment] for segment in shown if segment.dropped)]:
        if len(some) > _OPEN_AT_ONCE:
            found.append(ds.dataset([str(segment.path) for segment in some], schema=SPAN_SCHEMA, format=parquet))
        elif some:
            files = [parquet.make_fragment(pa.OSFile(str(segment.path))) for segment in some]
            found.append(ds.FileSystemDataset(files, SPAN_SCHEMA, parquet))
        if some and some[0].dropped:
            found[-1] = found[-1].filter(~ds.field("rollout_id").isin(sorted(some[0].dropped)))
    return found
