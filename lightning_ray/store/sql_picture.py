"""What a query reads of a store, as of one moment.

Taking a picture is quick, so that it can be done between two calls of a store at work; turning it into Arrow
is not, and may be done in any thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
import pyarrow.dataset as ds

from lightning_ray.store.shard_merge import merge_tables
from lightning_ray.store.snapshot import unpack_entry
from lightning_ray.store.sql_tables import TABLES, Needs, stored_columns

if TYPE_CHECKING:
    from lightning_ray.store.reading import StoreReader
    from lightning_ray.store.state import RolloutEntry, RunState

Source: TypeAlias = pa.Table | ds.Dataset

_ARROW = {
    "VARCHAR": pa.string(),
    "DOUBLE": pa.float64(),
    "INTEGER": pa.int32(),
    "BOOLEAN": pa.bool_(),
    "VARCHAR[]": pa.list_(pa.string()),
}


@dataclass(frozen=True)
class Picture:
    """Spans as they are stored; and what gives the other tables."""

    spans: Sequence[Source]
    others: Mapping[str, Callable[[], pa.Table]]


def picture_tables(pictures: Sequence[Picture]) -> dict[str, Source]:
    """The stored tables of one store, or of its shards, by the names that ``union_sql`` and ``view_sql`` use."""
    parts = [{table: make() for table, make in picture.others.items()} for picture in pictures]
    others = merge_tables(parts) if len(parts) > 1 else parts[0]
    spans = [source for picture in pictures for source in picture.spans]
    return {
        **{f"_spans_{number}": source for number, source in enumerate(spans)},
        **{f"_{table}": made for table, made in others.items()},
    }


def take_picture(reader: StoreReader, needs: Needs) -> Picture:
    """What a query with these needs reads of the store, as it stands now."""
    reads_spans = "spans" in needs or any("reward" in needed for needed in needs.values())
    spans = reader.span_dataset() if reads_spans else []
    others = {table: _table(reader.state, table, needed) for table, needed in needs.items() if table != "spans"}
    return Picture(spans, others)


def _table(state: RunState, table: str, needed: frozenset[str]) -> Callable[[], pa.Table]:
    stored = stored_columns(table, needed)
    names = [name for name in TABLES[table] if name in stored]
    getters = [_getter(table, name) for name in names]

    def rows(items: Iterable[Any]) -> list[tuple[Any, ...]]:
        return [tuple([get(item) for get in getters]) for item in items]

    def rows_of(entry: RolloutEntry) -> list[tuple[Any, ...]]:
        return rows([entry] if table == "rollouts" else entry.attempts)

    if table == "workers":
        taken = rows(state.workers.values())
        return lambda: _arrow(table, names, taken)
    if table == "resources":
        latest = state.latest_resources_id
        taken = rows((update, update.resources_id == latest) for update in state.resources.values())
        return lambda: _arrow(table, names, taken)
    # Rollouts that have ended are there as bytes, which do not change and take longer to read.
    entries = [entry if type(entry) is bytes else rows_of(entry) for entry in dict[str, Any].values(state.rollouts)]
    return lambda: _arrow(
        table,
        names,
        [row for entry in entries for row in (rows_of(unpack_entry(entry)) if isinstance(entry, bytes) else entry)],
    )


def _arrow(table: str, names: list[str], rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    arrays = {}
    for name, values in zip(names, columns, strict=True):
        if (table, name) in _JSON:
            values = tuple(None if value is None else to_json(value) for value in values)
        arrays[name] = pa.array(values, type=_ARROW[TABLES[table][name].type])
    return pa.table(arrays)


def to_json(value: Any) -> str:
    """A plain value as JSON text: bytes and what else JSON does not know as text, whole decimals as numbers."""
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, Decimal):
        return int(value) if value == int(value) else float(value)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def _getter(table: str, name: str) -> Callable[[Any], Any]:
    special = _SPECIAL.get((table, name))
    if special is not None:
        return special
    if table == "rollouts":
        return lambda entry: getattr(entry.rollout, name)
    if table == "resources":
        return lambda item: getattr(item[0], name)
    return lambda item: getattr(item, name)


def _attempts(entry: RolloutEntry) -> int:
    return len(entry.attempts)


def _last_attempt(entry: RolloutEntry) -> str | None:
    return entry.attempts[-1].attempt_id if entry.attempts else None


_SPECIAL: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("rollouts", "attempts"): _attempts,
    ("rollouts", "attempt_id"): _last_attempt,
    ("resources", "names"): lambda item: list(item[0].resources),
    ("resources", "latest"): lambda item: item[1],
}
_JSON = frozenset(
    {
        ("rollouts", "input"),
        ("rollouts", "metadata"),
        ("rollouts", "config"),
        ("attempts", "metadata"),
        ("workers", "heartbeat_stats"),
    }
)
