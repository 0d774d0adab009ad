"""Writing a segment: rows into row groups, and beside them where they lie, with checksums.

A row group holds whole rollouts up to a size that is quick to read, or one large rollout: only a huge one is
cut, so that the prefix its turns repeat stays within one page of a column.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_ray.errors import StoreError
from lightning_ray.store.footers import read_footer
from lightning_ray.store.schema import SPAN_SCHEMA
from lightning_ray.store.sealed import write_sealed
from lightning_ray.store.segments import PART, Content, parquet_path, part_path

_GROUP_BYTES = 128 * 2**10
_GROUP_ROWS = 4096
_ROLLOUT_BYTES = 64 * 2**20
_PAGE_BYTES = 2**30
_TOKENS = ("prompt_ids", "sampled_ids", "logprobs")


def write_segment(
    folder: Path, stem: str, rollouts: Iterable[tuple[str, list[pa.RecordBatch]]], content: Content
) -> None:
    """Write a segment's two files and sync them; ``rollouts`` are ids with all their rows."""
    path = parquet_path(folder, stem)
    ids: list[str] = []
    counts: list[int] = []
    group_rows: list[int] = []
    raw = 0
    with _parquet_writer(path) as writer:
        for group in _groups(_counted(rollouts, ids, counts)):
            table = pa.Table.from_batches(group, schema=SPAN_SCHEMA).combine_chunks()
            writer.write_table(table, row_group_size=max(table.num_rows, 1))
            group_rows.append(table.num_rows)
            raw += table.nbytes
    with path.open("rb+") as file:
        groups, footer = _measure(file, group_rows)
        os.fsync(file.fileno())
    numbers = {rollout_id: number for number, rollout_id in enumerate(ids)}
    for rollout_id, _, _ in content.entries:
        numbers.setdefault(rollout_id, len(numbers))
    part = {
        "ids": list(numbers),
        "counts": counts,
        "entries": [(numbers[rollout_id], serial, packed) for rollout_id, serial, packed in content.entries],
        "statuses": content.statuses,
        "attempts": content.attempts,
        "carried": content.carried,
        "groups": groups,
        "footer": footer,
        "raw_bytes": raw,
    }
    write_sealed(part_path(folder, stem), PART, part)


def _parquet_writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        SPAN_SCHEMA,
        compression="zstd",
        compression_level=3,
        data_page_size=_PAGE_BYTES,
        use_dictionary=False,
        column_encoding={f"{name}.list.item": "BYTE_STREAM_SPLIT" for name in _TOKENS},
        use_compliant_nested_type=False,
        store_schema=False,
        write_statistics=["rollout_id", "start_time"],
        write_page_checksum=True,
    )


def _counted(
    rollouts: Iterable[tuple[str, list[pa.RecordBatch]]], ids: list[str], counts: list[int]
) -> Iterator[list[pa.RecordBatch]]:
    for rollout_id, batches in rollouts:
        ids.append(rollout_id)
        counts.append(sum(batch.num_rows for batch in batches))
        yield batches


def _groups(rollouts: Iterable[list[pa.RecordBatch]]) -> Iterator[list[pa.RecordBatch]]:
    """The rows of each row group: whole rollouts up to a size, a large rollout alone, a huge one in parts."""
    pending: list[pa.RecordBatch] = []
    size = rows = 0
    for batches in rollouts:
        alone = [batch.nbytes for batch in batches]
        if pending and (size + sum(alone) > 2 * _GROUP_BYTES or rows > _GROUP_ROWS):
            yield pending
            pending, size, rows = [], 0, 0
        for batch, bytes_ in zip(batches, alone, strict=True):
            pending.append(batch)
            size, rows = size + bytes_, rows + batch.num_rows
            if size > _ROLLOUT_BYTES:
                yield pending
                pending, size, rows = [], 0, 0
        if size > _GROUP_BYTES:
            yield pending
            pending, size, rows = [], 0, 0
    if pending:
        yield pending


def _measure(file: Any, group_rows: list[int]) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    """Where the row groups and their footers lie, with a checksum of both; and the footer's frame."""
    footer = read_footer(file)
    size = file.seek(0, 2)
    metadata = pq.read_metadata(file)
    if len(footer.groups) != len(group_rows) or metadata.num_rows != sum(group_rows):
        raise StoreError(f"{file.name}: {metadata.num_rows} spans were written instead of {sum(group_rows)}")
    starts = [metadata.row_group(number).column(0).data_page_offset for number in range(len(group_rows))]
    groups: list[tuple[int, ...]] = []
    ends = list(accumulate(group_rows))
    for number, (offset, (at, length)) in enumerate(zip(starts, footer.groups, strict=True)):
        stop = starts[number + 1] if number + 1 < len(starts) else footer.start
        data = _read(file, offset, stop - offset)
        told = _read(file, at, length)
        groups.append((ends[number], offset, stop - offset, at, length, zlib.crc32(told, zlib.crc32(data))))
    return groups, {"head": footer.head, "tail": footer.tail, "size": size}


def _read(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
