"""Which rows of which log record are a rollout's spans, and which span ids an attempt already has.

Small and in memory: a few integers a batch and rollout. The span ids of finished rollouts are let go and read
from the log again if a resend comes after all. The rows themselves stay in the log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from lightning_ray.store.log import BodyReader, BodyRef
from lightning_ray.store.schema import SPAN_SCHEMA, decode_batch

Run = tuple[str, str, int, int]
"""Rows of one attempt that follow each other: rollout id, attempt id, first row, number of rows."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The rows of a batch that are new and of known attempts.

    They come as a batch, as runs, and as (attempt, span) ids by rollout; ``unknown`` are the (rollout,
    attempt) ids of rows left out because nobody knows them.
    """

    batch: pa.RecordBatch
    runs: list[Run]
    ids: dict[str, set[tuple[str, str]]]
    unknown: list[tuple[str, str]]


class SpanIndex:
    """Finds spans in a folder's log."""

    def __init__(self, folder: Path) -> None:
        self.spans = 0
        """Rows in the log."""
        self._reader = BodyReader(folder)
        self._rows: defaultdict[str, list[tuple[BodyRef, int, int]]] = defaultdict(list)
        self._bodies: list[BodyRef] = []
        self._ids: dict[str, set[tuple[str, str]]] = {}

    def add(self, ref: BodyRef, runs: list[Run]) -> None:
        """Note where a record's spans lie."""
        self._bodies.append(ref)
        for rollout_id, _attempt_id, start, count in runs:
            self._rows[rollout_id].append((ref, start, count))
            self.spans += count

    def admit(self, batch: pa.RecordBatch, is_known: Callable[[str, str], bool]) -> Admitted:
        """Choose a batch's rows of known attempts that are not stored yet, once each. Changes nothing."""
        rollouts, attempts, spans = (batch.column(name).to_pylist() for name in ("rollout_id", "attempt_id", "span_id"))
        keys = zip(rollouts, attempts, strict=True)
        keep: list[int] = []
        admitted = Admitted(batch, [], {}, [])
        for (rollout_id, attempt_id), rows in groupby(enumerate(keys), key=lambda pair: pair[1]):
            if not is_known(rollout_id, attempt_id):
                admitted.unknown.append((rollout_id, attempt_id))
                continue
            stored, first = self._ids_of(rollout_id), len(keep)
            fresh = admitted.ids.setdefault(rollout_id, set())
            for row, _ in rows:
                key = (attempt_id, spans[row])
                if key not in stored and key not in fresh:
                    fresh.add(key)
                    keep.append(row)
            if len(keep) > first:
                admitted.runs.append((rollout_id, attempt_id, first, len(keep) - first))
        if len(keep) == batch.num_rows:
            return admitted
        return replace(admitted, batch=batch.take(pa.array(keep, pa.int64())))

    def remember(self, ids: dict[str, set[tuple[str, str]]]) -> None:
        """Note admitted ids as stored."""
        for rollout_id, fresh in ids.items():
            self._ids[rollout_id] |= fresh

    def forget(self, rollout_id: str) -> None:
        """Let go of the span ids of a rollout that has ended."""
        self._ids.pop(rollout_id, None)

    def table(self, rollout_ids: list[str]) -> pa.Table:
        """The spans of the rollouts, one rollout after the other, each in order of arrival."""
        rows = [row for rollout_id in dict.fromkeys(rollout_ids) for row in self._rows.get(rollout_id, ())]
        batches = [self._read(ref).slice(start, count) for ref, start, count in rows]
        return pa.Table.from_batches(batches, schema=SPAN_SCHEMA)

    def whole_table(self) -> pa.Table:
        """All spans, in order of arrival."""
        return pa.Table.from_batches([self._read(ref) for ref in self._bodies], schema=SPAN_SCHEMA)

    def _read(self, ref: BodyRef) -> pa.RecordBatch:
        return decode_batch(self._reader.read(ref))

    def _ids_of(self, rollout_id: str) -> set[tuple[str, str]]:
        ids = self._ids.get(rollout_id)
        if ids is None:
            stored = self.table([rollout_id])
            ids = set(zip(stored["attempt_id"].to_pylist(), stored["span_id"].to_pylist(), strict=True))
            self._ids[rollout_id] = ids
        return ids
