"""The numbers of spans within their rollout: given on arrival to those that come without, filled in on reading.

A run tells of rows of one attempt that follow each other in a batch. Rows with a ``sequence_id`` of 0 have the
run's first number and those that follow it; the bytes that were logged stay as they came.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from lightning_ray.store.schema import SPAN_SCHEMA

Run = tuple[str, str, int, int, int, int]
"""Rollout id, attempt id, first row, number of rows, first number to give (0 if all rows have one), and the
rollout's last number after these rows."""
_COLUMN = SPAN_SCHEMA.get_field_index("sequence_id")


def count_up(sequences: Sequence[int], before: int) -> tuple[int, int]:
    """The first number to give to those rows that have 0, and the last number that is then in use."""
    highest = max(before, *sequences)
    missing = sequences.count(0)
    return (highest + 1, highest + missing) if missing else (0, highest)


def numbered(batch: pa.RecordBatch, run: Run) -> pa.RecordBatch:
    """The run's rows of its batch, with all their numbers."""
    _, _, start, count, first, _ = run
    rows = batch.slice(start, count)
    if not first:
        return rows
    if count == 1:
        sequences = np.array([first], np.int32)
    else:
        sequences = np.array(rows.column(_COLUMN))
        missing = sequences == 0
        sequences[missing] = np.arange(first, first + np.count_nonzero(missing))
    return rows.set_column(_COLUMN, SPAN_SCHEMA.field(_COLUMN), pa.array(sequences, pa.int32()))
