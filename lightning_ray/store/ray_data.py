"""A store's spans as a Ray dataset: tasks read the segments where they lie, the log's tail is brought along.

A run that has ended may as well be read by ``ray.data.read_parquet(store / "segments")``, unless rollouts were deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.errors import StoreError
from lightning_ray.store.schema import SPAN_SCHEMA
from lightning_ray.store.view import StoreView, open_folder

_BLOCK_ROWS = 4096


def read_dataset(folder: str | Path, columns: Sequence[str] | None = None) -> Any:
    """The spans of a store's folder, as they stand, as a ``ray.data.Dataset`` with the columns of SPAN_SCHEMA, or
    some of them; in no particular order.

    Segments must be at that path on all nodes. Of a store at work read soon, since compactions replace segments.
    Raises StoreError for unknown columns, and if the folder holds no store.
    """
    unknown = sorted(set(columns or ()) - set(SPAN_SCHEMA.names))
    if unknown:
        raise StoreError(f"spans have no columns {unknown}; they have {SPAN_SCHEMA.names}")
    wanted = SPAN_SCHEMA.names if columns is None else list(columns)
    view = open_folder(Path(folder).absolute())
    views = [view] if isinstance(view, StoreView) else view.shards
    first, *others = [part for each in views for part in _parts(each, wanted)] or [_from_tables([], wanted)]
    return first.union(*others) if others else first


def _parts(view: StoreView, columns: list[str]) -> list[Any]:
    import ray.data

    tables = [source for source in view.span_dataset() if isinstance(source, pa.Table) and source.num_rows]
    segments = [segment for segment in view.index.segments if segment.rows]
    whole = [str(segment.path) for segment in segments if not segment.dropped]
    parts = [ray.data.read_parquet(whole).select_columns(columns)] if whole else []
    for segment in segments:
        if segment.dropped:
            read = ray.data.read_parquet(str(segment.path)).select_columns(list({*columns, "rollout_id"}))
            left_out = {"dropped": pa.array(sorted(segment.dropped)), "columns": columns}
            parts.append(read.map_batches(_without, fn_kwargs=left_out, batch_format="pyarrow"))
    return [*parts, _from_tables(tables, columns)] if tables else parts


def _without(rows: pa.Table, dropped: pa.Array, columns: list[str]) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["rollout_id"], dropped))).select(columns)


def _from_tables(tables: list[pa.Table], columns: list[str]) -> Any:
    import ray.data

    whole = pa.concat_tables([SPAN_SCHEMA.empty_table(), *tables]).select(columns)
    starts = range(0, max(whole.num_rows, 1), _BLOCK_ROWS)
    return ray.data.from_arrow([whole.slice(start, _BLOCK_ROWS) for start in starts])
