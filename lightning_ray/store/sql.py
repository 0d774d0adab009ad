"""Read-only SQL over a store, by DuckDB: the tables of ``sql_tables``, and nothing else.

A query is one SELECT. It reaches no file, network, setting, extension or Python variable: ``sql_check`` looks
at what it names, and DuckDB is told so and its configuration locked. It ends by its deadline and its answer has
a bound; the memory limit is DuckDB's own, which a single huge value may exceed. Only columns that the query
names are read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.packing import unpack
from lightning_ray.store.shard_merge import merge_tables
from lightning_ray.store.sql_check import checked, duckdb
from lightning_ray.store.sql_picture import Source, picture_tables, take_picture, to_json
from lightning_ray.store.sql_tables import EVERYTHING, TABLES, Needs, names_of, needs_of, union_sql, view_sql

if TYPE_CHECKING:
    from lightning_ray.store.reading import StoreReader

_LOCKS = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_persistent_secrets": "false",
    "python_enable_replacements": "false",
    "max_temp_directory_size": "0KB",
}
_BATCH_ROWS = 16_384
_QUERIES_AT_ONCE = 2
_TRIES = 10
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a query may take: seconds, bytes of DuckDB's memory, bytes of its answer, threads."""

    seconds: float = 60.0
    memory_bytes: int = 2**30
    answer_bytes: int = 2**29
    threads: int = 2


DEFAULT = Limits()


class _Replaced(StoreError):
    """A compaction removed a file after the picture was taken: another one is to be taken."""


def run_sql(query: str, readers: Sequence[StoreReader], limits: Limits = DEFAULT) -> pa.Table:
    """The answer of one query over a store, or over the shards of one.

    Raises StoreError with DuckDB's message; if a name is unknown, with those that there are.
    """
    for _ in range(_TRIES):
        try:
            return prepare(query, readers, limits)()
        except _Replaced as error:
            failure = error
        for reader in readers:
            reader.refresh()
    raise failure


def prepare(query: str, readers: Sequence[StoreReader], limits: Limits = DEFAULT) -> Callable[[], pa.Table]:
    """Check a query and take the picture it is about; what is returned gives the answer, in any thread."""
    needs = checked(query)
    pictures = [take_picture(reader, needs) for reader in readers]
    return lambda: _answer(query, picture_tables(pictures), needs, limits)


async def service_sql(reader: StoreReader, query: str, limits: Limits = DEFAULT) -> pa.Table:
    """``run_sql`` on a store at work in this event loop, as it now stands, in a thread beside the loop."""
    return await _beside(lambda: prepare(query, [reader], limits))


async def service_tables(
    reader: StoreReader, columns: Sequence[str] | None = None, limits: Limits = DEFAULT
) -> dict[str, pa.Table]:
    """``tables_of`` a store at work in this event loop, as it now stands, in a thread beside the loop."""
    return await _beside(lambda: _prepare_tables(reader, columns, limits))


def tables_of(
    reader: StoreReader, columns: Sequence[str] | None = None, limits: Limits = DEFAULT
) -> dict[str, pa.Table]:
    """The tables as SQL sees them, with the columns that ``columns_needed`` gave (None: all)."""
    return _prepare_tables(reader, columns, limits)()


def columns_needed(query: str) -> list[str]:
    """The columns that a query may read, as ``table.column``; rather too many than too few. Raises StoreError
    for what ``run_sql`` would refuse before reading.
    """
    return names_of(checked(query))


def sql_over_tables(query: str, parts: Sequence[Mapping[str, pa.Table]], limits: Limits = DEFAULT) -> pa.Table:
    """``run_sql`` over what ``tables_of`` gave for each shard of a store."""
    checked(query)
    return _answer(query, merge_tables(parts) if len(parts) > 1 else parts[0], {}, limits)


async def _beside(prepared: Callable[[], Callable[[], T]]) -> T:
    for _ in range(_TRIES):
        try:
            return await asyncio.get_running_loop().run_in_executor(_threads(), prepared())
        except _Replaced as error:
            failure = error
    raise failure


def _prepare_tables(
    reader: StoreReader, columns: Sequence[str] | None, limits: Limits
) -> Callable[[], dict[str, pa.Table]]:
    needs = EVERYTHING if columns is None else needs_of(columns)
    picture = take_picture(reader, needs)

    def answer() -> dict[str, pa.Table]:
        stored = picture_tables([picture])
        return {name: _answer(f"FROM {name}", stored, needs, limits) for name in needs}

    return answer


def _answer(query: str, tables: Mapping[str, Source], views: Needs, limits: Limits) -> pa.Table:
    module = duckdb()
    config = {**_LOCKS, "threads": str(limits.threads), "memory_limit": f"{limits.memory_bytes}B"}
    connection = module.connect(":memory:", config=config)
    try:
        connection.create_function(
            "attribute", _attribute, ["BLOB", "VARCHAR"], "VARCHAR", type="arrow", null_handling="special"
        )
        for name, table in tables.items():
            connection.register(name, table)
        if views:
            connection.execute(f"CREATE VIEW _spans AS {union_sql(tables)}")
        for name, columns in views.items():
            connection.execute(f"CREATE VIEW {name} AS {view_sql(name, columns)}")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET lock_configuration = true")
        with _deadline(connection, limits.seconds):
            return _read(connection.sql(query).to_arrow_reader(_BATCH_ROWS), limits.answer_bytes)
    except module.InterruptException as error:
        raise StoreError(f"the SQL took longer than {limits.seconds:g} s and was broken off; ask for less") from error
    except RuntimeError as error:  # DuckDB's way to say that Ctrl-C was pressed
        raise (KeyboardInterrupt() if "interrupted" in str(error) else error) from None
    except module.Error as error:
        kind = _Replaced if "Failed to open local file" in str(error) else StoreError
        raise kind(_told(str(error), views or tables)) from error
    finally:
        connection.close()
        pa.default_memory_pool().release_unused()


def _read(reader: pa.RecordBatchReader, most: int) -> pa.Table:
    batches, size = [], 0
    for batch in reader:
        batches.append(batch)
        size += batch.nbytes
        if size > most:
            raise StoreError(f"the answer has more than {most} bytes; ask for less, or for aggregates")
    return pa.Table.from_batches(batches, schema=reader.schema)


@contextmanager
def _deadline(connection: Any, seconds: float) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        expired = not done.wait(seconds)
        while expired and not done.wait(0.05):
            connection.interrupt()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _told(message: str, tables: Mapping[str, Any]) -> str:
    if "Table with name" in message:
        return f"{message}\nTables: {', '.join(TABLES)}"
    if "Referenced column" in message or "Values list" in message or "does not have a column" in message:
        lines = (f"Columns of {name}: {', '.join(TABLES[name])}" for name in tables if name in TABLES)
        return "\n".join([message, *lines])
    return message


def _attribute(more: pa.ChunkedArray, keys: pa.ChunkedArray) -> pa.Array:
    """What each span has under a key among its attributes, or else beside them: text, or JSON."""
    found = (_value(packed.as_buffer(), key.as_py()) for packed, key in zip(more, keys, strict=True))
    return pa.array(found, pa.string())


def _value(packed: pa.Buffer | None, key: str | None) -> str | None:
    if packed is None or key is None:
        return None
    span = unpack(packed)
    attributes = span.get("attributes") or {}
    value = attributes[key] if key in attributes else span.get(key)
    return value if value is None or isinstance(value, str) else to_json(value)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_QUERIES_AT_ONCE, "sql")
