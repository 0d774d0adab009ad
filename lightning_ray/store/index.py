"""Which rows of which log record or segment are a rollout's spans, and which span ids an attempt already has.

Small and in memory: a few integers a batch and rollout. The span ids of finished rollouts are let go and read
again if a resend comes after all. The rows themselves stay in the files, and no file stays mapped.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.store.log import BodyReader, BodyRef
from lightning_ray.store.numbering import Run, count_up, numbered
from lightning_ray.store.schema import SPAN_SCHEMA, decode_batch
from lightning_ray.store.segments import OpenFiles, Segment, datasets
from lightning_ray.store.tail import LogFile

if TYPE_CHECKING:
    import pyarrow.dataset as ds

Ids = dict[str, dict[str, set[str]]]
"""Span ids by rollout and attempt."""
_KEPT_GROUPS = 4
_OPEN_FILES = 64
_HELD_FILES = 512


@dataclass(frozen=True, slots=True)
class Admitted:
    """The rows of a batch that are new and of known attempts, as a batch, as runs and by their ids."""

    batch: pa.RecordBatch
    runs: list[Run]
    ids: Ids
    unknown: list[tuple[str, str]]
    """(Rollout, attempt) ids of rows left out because nobody knows them."""
    left_out: list[int]
    """Rows left out because they are stored, or twice in the batch."""


class SpanIndex:
    """Finds spans in a folder's segments and log."""

    def __init__(self, folder: Path) -> None:
        self.segments: list[Segment] = []
        self._folder = folder
        self._bodies: BodyReader | None = None
        self._drops: dict[str, int] = {}
        self._files = OpenFiles(_OPEN_FILES)
        self._logs: dict[int, LogFile] = {}
        self._ids: Ids = {}

    @property
    def spans(self) -> int:
        """Rows of rollouts that were not deleted."""
        return sum(segment.rows for segment in self.segments) + sum(log.rows for log in self._logs.values())

    def hold(self) -> None:
        """Keep the files open that are known now, so that they can be read when their writer has removed them;
        of very many segments only some. Raises FileNotFoundError if it already has.
        """
        self._bodies = BodyReader(self._folder)
        for number in self._logs:
            self._bodies.open(number)
        self._files = OpenFiles(_HELD_FILES)
        for segment in self.segments:
            self._files.open(segment.path)

    def add(self, ref: BodyRef, runs: Sequence[Run]) -> None:
        """Note where a record's spans lie."""
        log = self._logs.get(ref.number)
        if log is None:
            log = self._logs[ref.number] = LogFile()
        log.add(ref, runs)

    def put_segment(self, segment: Segment | None, old: Sequence[str], covered: int) -> None:
        """Have a segment (or none) replace others (by their names) and the log files up to ``covered``.

        What was deleted in later log files is dropped from it.
        """
        at = next((at for at, one in enumerate(self.segments) if one.stem in old), len(self.segments))
        for one in self.segments[at : at + len(old)]:
            self._files.close(one.path)
        self.segments[at : at + len(old)] = [] if segment is None else [segment]
        for number in [number for number in self._logs if number <= covered]:
            del self._logs[number]
        self._drops = {rollout_id: number for rollout_id, number in self._drops.items() if number > covered}
        if segment is not None:
            for rollout_id in self._drops:
                segment.drop(rollout_id)

    def admit(
        self, batch: pa.RecordBatch, is_known: Callable[[str, str], bool], sequence_of: Callable[[str], int]
    ) -> Admitted:
        """Choose a batch's rows of known attempts that are not stored yet, once each, and number those that
        come without a sequence id. Changes nothing; ``sequence_of`` is a rollout's last number.
        """
        rollouts, attempts, spans = (batch.column(name).to_pylist() for name in ("rollout_id", "attempt_id", "span_id"))
        sequences = batch.column("sequence_id").to_pylist()
        admitted = Admitted(batch, [], {}, [], [])
        keep: list[int] = []
        lasts: dict[str, int] = {}
        for start, stop in _stretches(rollouts, attempts):
            rollout_id, attempt_id = rollouts[start], attempts[start]
            if not is_known(rollout_id, attempt_id):
                admitted.unknown.append((rollout_id, attempt_id))
                continue
            rows = self._fresh(admitted, rollout_id, attempt_id, spans, start, stop)
            if not rows:
                continue
            before = lasts[rollout_id] if rollout_id in lasts else sequence_of(rollout_id)
            first, lasts[rollout_id] = count_up([sequences[row] for row in rows], before)
            admitted.runs.append((rollout_id, attempt_id, len(keep), len(rows), first, lasts[rollout_id]))
            keep += rows
        if len(keep) == batch.num_rows:
            return admitted
        return replace(admitted, batch=batch.take(pa.array(keep, pa.int64())))

    def remember(self, ids: Ids) -> None:
        """Note admitted ids as stored."""
        for rollout_id, attempts in ids.items():
            stored = self._ids_of(rollout_id)
            for attempt_id, fresh in attempts.items():
                stored[attempt_id] |= fresh

    def forget(self, rollout_id: str) -> None:
        """Let go of the span ids of a rollout that has ended."""
        self._ids.pop(rollout_id, None)

    def drop(self, rollout_id: str, number: int = 0) -> None:
        """Forget a deleted rollout's spans; ``number`` is the log file in which the deletion stands."""
        self._ids.pop(rollout_id, None)
        if number:
            self._drops[rollout_id] = number
        for segment in self.segments:
            segment.drop(rollout_id)
        for log in self._logs.values():
            log.drop(rollout_id)

    def table(
        self, rollout_ids: Sequence[str], attempt_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The spans of the rollouts, one rollout after the other, each in order of arrival; of one attempt, if
        it is given.
        """
        wanted = None if columns is None else list(columns)
        schema = SPAN_SCHEMA if wanted is None else pa.schema([SPAN_SCHEMA.field(name) for name in wanted])
        reading = _Reading(self._files, self._open_bodies(), wanted, attempt_id)
        batches: list[pa.RecordBatch] = []
        for source, start, count in self._places(dict.fromkeys(rollout_ids)):
            if isinstance(source, Segment):
                batches += reading.segment(source, start, count)
            else:
                batches += reading.log(source[0], source[1])
        return pa.Table.from_batches(batches, schema=schema)

    def dataset(self, columns: Sequence[str] | None = None) -> list[ds.Dataset | pa.Table]:
        """All spans: datasets and tables, in no particular order."""
        found: list[ds.Dataset | pa.Table] = datasets(self.segments)
        bodies = self._open_bodies()
        batches = [batch for log in self._logs.values() for batch in log.batches(bodies)]
        tail = pa.Table.from_batches(batches, schema=SPAN_SCHEMA)
        found.append(tail if columns is None else tail.select(list(columns)))
        return found

    def whole_table(self) -> pa.Table:
        """All spans: the segments' in their order, then the log's in order of arrival."""
        batches = [batch for segment in self.segments for batch in segment.batches(self._files)]
        bodies = self._open_bodies()
        batches += [batch for log in self._logs.values() for batch in log.batches(bodies)]
        return pa.Table.from_batches(batches, schema=SPAN_SCHEMA)

    def _fresh(
        self, admitted: Admitted, rollout_id: str, attempt_id: str, spans: list[str], start: int, stop: int
    ) -> Sequence[int]:
        """The rows of a stretch whose span ids are new; notes them."""
        stored = self._ids_of(rollout_id)[attempt_id]
        fresh = admitted.ids.setdefault(rollout_id, defaultdict(set))[attempt_id]
        ids = set(spans[start:stop])
        if len(ids) == stop - start and stored.isdisjoint(ids) and fresh.isdisjoint(ids):
            fresh |= ids
            return range(start, stop)
        rows = []
        for row in range(start, stop):
            if spans[row] in stored or spans[row] in fresh:
                admitted.left_out.append(row)
            else:
                fresh.add(spans[row])
                rows.append(row)
        return rows

    def _ids_of(self, rollout_id: str) -> dict[str, set[str]]:
        ids = self._ids.get(rollout_id)
        if ids is None:
            ids = self._ids[rollout_id] = defaultdict(set)
            if not self._has(rollout_id):
                return ids
            stored = self.table([rollout_id], columns=["attempt_id", "span_id"])
            for attempt_id, span_id in zip(*(column.to_pylist() for column in stored.columns), strict=True):
                ids[attempt_id].add(span_id)
        return ids

    def _places(self, rollout_ids: Iterable[str]) -> Iterator[tuple[Segment | tuple[BodyRef, Run], int, int]]:
        """Where the rollouts' rows lie, one after the other; rows that follow each other in a segment as one."""
        pending: tuple[Segment, int, int] | None = None
        for rollout_id in rollout_ids:
            for segment in self.segments:
                place = segment.place(rollout_id)
                if place is None:
                    continue
                if pending is not None and pending[0] is segment and sum(pending[1:]) == place[0]:
                    pending = segment, pending[1], pending[2] + place[1]
                    continue
                if pending is not None:
                    yield pending
                pending = segment, *place
            for log in self._logs.values():
                for ref, run in log.places(rollout_id):
                    if pending is not None:
                        yield pending
                        pending = None
                    yield (ref, run), run[2], run[3]
        if pending is not None:
            yield pending

    def _open_bodies(self) -> BodyReader:
        """The log's files; a writer's stay mapped for one question only."""
        return self._bodies or BodyReader(self._folder)

    def _has(self, rollout_id: str) -> bool:
        return any(segment.place(rollout_id) for segment in self.segments) or any(
            log.places(rollout_id) for log in self._logs.values()
        )


class _Reading:
    """One question: row groups and log files are opened once for all of its rollouts."""

    def __init__(self, files: OpenFiles, bodies: BodyReader, columns: list[str] | None, attempt_id: str | None) -> None:
        self._files, self._bodies = files, bodies
        self._columns, self._attempt_id = columns, attempt_id
        self._read = columns
        if columns is not None and attempt_id is not None and "attempt_id" not in columns:
            self._read = [*columns, "attempt_id"]
        self._groups: OrderedDict[tuple[str, int], pa.RecordBatch] = OrderedDict()
        self._decoded: dict[BodyRef, pa.RecordBatch] = {}
        """Bodies of the log: several of the rollouts may have rows in one. They lie in the file, not in memory."""

    def segment(self, segment: Segment, start: int, count: int) -> Iterator[pa.RecordBatch]:
        """Rows of a segment. A few of a row group are copied, so that the others do not stay in memory."""
        for number, first, rows_here in segment.groups_of(start, count):
            group = self._group(segment, number)
            rows = group.slice(first, rows_here)
            if self._attempt_id is not None:
                rows = rows.filter(pc.equal(rows["attempt_id"], self._attempt_id))
            elif len(self._groups) > 1 and 2 * rows_here < group.num_rows:
                rows = rows.take(pa.array(np.arange(rows_here)))
            yield rows if self._columns is None else rows.select(self._columns)

    def log(self, ref: BodyRef, run: Run) -> Iterator[pa.RecordBatch]:
        """Rows of a log file."""
        if self._attempt_id is None or run[1] == self._attempt_id:
            if ref not in self._decoded:
                self._decoded[ref] = decode_batch(self._bodies.read(ref))
            rows = numbered(self._decoded[ref], run)
            yield rows if self._columns is None else rows.select(self._columns)

    def _group(self, segment: Segment, number: int) -> pa.RecordBatch:
        key = (segment.stem, number)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = segment.read_group(number, self._read, self._files)
            if len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
        return group


def _stretches(rollouts: list[str], attempts: list[str]) -> Iterator[tuple[int, int]]:
    """Where rows of one attempt follow each other: first row, and the row behind the last."""
    start, count = 0, len(rollouts)
    for row in range(1, count + 1):
        if row == count or rollouts[row] != rollouts[start] or attempts[row] != attempts[start]:
            yield start, row
            start = row
