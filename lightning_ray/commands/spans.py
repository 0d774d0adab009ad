"""``lightning-ray spans``: SQL over a run's store, at work or finished, and the answer in a form of choice.

The store is read from its folder; no process of the run is asked, and nothing is changed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning_ray.errors import ConfigError
from lightning_ray.mirror import is_url, place_of
from lightning_ray.mirror.pull import but_weights, everything, fetched

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("table", "csv", "json", "parquet", "arrow")
_SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_BINARY = frozenset({"parquet", "arrow"})


def add_spans_command(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "spans",
        help="ask a run's store by SQL",
        description="Ask a run's spans, rollouts, attempts, workers and resources by SQL (DuckDB's, read-only).",
    )
    command.add_argument("sql", nargs="?", help="one SELECT; - reads it from stdin")
    add_folder_argument(command, nargs="?")
    command.add_argument("--tables", action="store_true", help="tell what tables and columns there are")
    command.add_argument("--format", choices=FORMATS, help="json is a line each (default: table, or as FILE ends)")
    command.add_argument("--output", type=Path, metavar="FILE", help="write the answer there")
    command.add_argument("--rows", type=int, default=100, help="the most rows of a table (default: %(default)s)")
    command.add_argument(
        "--width", type=int, default=60, help="the most characters of its cells (default: %(default)s)"
    )
    command.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="default: %(default)g")
    command.add_argument(
        "--memory",
        type=float,
        default=2.0,
        metavar="GB",
        help="for sorting, joining, the answer (default: %(default)g)",
    )


def spans(given: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError and StoreError for what the user can mend."""
    if given.tables:
        print_tables()
        return 0
    if given.sql is None:
        raise ConfigError("spans: give the SQL, for instance 'SELECT name, count(*) FROM spans GROUP BY name'")
    if given.timeout <= 0 or given.memory <= 0:
        raise ConfigError(f"--timeout {given.timeout:g} --memory {given.memory:g}: give numbers above 0")
    form = given.format or _SUFFIXES.get(given.output.suffix if given.output else "", "table")
    if form in _BINARY and given.output is None and sys.stdout.isatty():
        raise ConfigError(f"--format {form}: not for a terminal; add --output FILE")

    from lightning_ray.store.sql import Limits, run_sql
    from lightning_ray.store.view import open_folder

    query = sys.stdin.read() if given.sql == "-" else given.sql
    memory = int(given.memory * 1e9)
    view = open_folder(store_folder(given.folder))
    answer = run_sql(query, getattr(view, "shards", [view]), Limits(given.timeout, memory, memory))
    try:
        if form == "table":
            print_answer(answer, given.rows, given.width, given.output)
        else:
            write_answer(answer, form, given.output)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has had enough, as in ``| head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def add_folder_argument(command: Any, **options: Any) -> None:
    """Declare the argument for ``store_folder``."""
    told = "a run's folder or URL, or its store's folder"
    told += " (default: the run last written in runs/)" if options.get("nargs") == "?" else ""
    command.add_argument("folder", type=_folder, help=told, **options)


def _folder(text: str) -> Path:
    """A path; of a URL its local place."""
    try:
        return place_of(text) if is_url(text) else Path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def store_folder(folder: Path | None, runs: Path = Path("runs"), weights: bool = False) -> Path:
    """The store that is meant: of the folder, or of the run under ``runs`` that was last written to. A run at a URL is
    brought here, with its weights or without.
    """
    if folder is not None:
        folder = fetched(folder, everything if weights else but_weights)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give a run's folder, or its store's")
        return folder / "store" if (folder / "store").is_dir() else folder
    stores = [path for path in runs.glob("*/store") if path.is_dir()]
    if not stores:
        raise ConfigError(f"{runs}/: there is no run with a store in it; give a run's folder after the SQL")
    return max(stores, key=_last_written)


def _last_written(store: Path) -> float:
    return max((path.stat().st_mtime for path in store.rglob("*.log")), default=store.stat().st_mtime)


def print_tables() -> None:
    """What there is to ask for."""
    from rich.console import Console
    from rich.table import Table

    from lightning_ray.store.sql_tables import TABLES

    console = Console(width=None if sys.stdout.isatty() else 200)
    for name, columns in TABLES.items():
        table = Table(title=name, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
        for column, (type_, what, _) in columns.items():
            table.add_row(f"  {column}", type_, what)
        console.print(table, "")


def print_answer(answer: pa.Table, rows: int, width: int, output: Path | None = None) -> None:
    """The answer as a table for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for field in answer.schema:
        table.add_column(escape(field.name), justify="right" if _is_number(field.type) else "left", no_wrap=True)
    for row in zip(*(column.to_pylist() for column in answer.slice(0, rows).columns), strict=True):
        table.add_row(*(escape(cell(value, width)) for value in row))
    with _opened(output, "w") as file:
        on_terminal = output is None and sys.stdout.isatty()
        console = Console(file=file, width=None if on_terminal else 10_000)
        console.print(table)
        if answer.num_rows > rows:
            console.print(f"{rows} of {answer.num_rows} rows; more with --rows", highlight=False)


def cell(value: Any, width: int) -> str:
    """A value in at most ``width`` characters."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.3f}"
    text = f"{len(value)} bytes" if isinstance(value, bytes) else " ".join(str(value).split())
    return text if len(text) <= width else text[: max(width - 1, 1)] + "…"


def write_answer(answer: pa.Table, form: str, output: Path | None) -> None:
    """The answer for programs, to a file or stdout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if form == "json":
        with _opened(output, "w") as file:
            for batch in answer.to_batches(max_chunksize=1000):
                file.writelines(_json(row) + "\n" for row in batch.to_pylist())
        return
    with _opened(output, "wb") as file:
        if form == "csv":
            _write_csv(answer, file)
        elif form == "parquet":
            pq.write_table(answer, file, compression="zstd")
        else:
            with pa.ipc.new_file(file, answer.schema) as writer:
                writer.write_table(answer)


def _write_csv(answer: pa.Table, file: IO[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.csv

    columns = [
        pa.array([None if value is None else _json(value) for value in column.to_pylist()], pa.string())
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type)
        else column
        for column in answer.columns
    ]
    pyarrow.csv.write_csv(pa.table(columns, names=answer.column_names), file)


def _json(value: Any) -> str:
    from lightning_ray.store.sql_picture import to_json

    return to_json(value)


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


@contextmanager
def _opened(output: Path | None, mode: str) -> Iterator[Any]:
    """A file to write, or stdout."""
    if output is None:
        yield sys.stdout.buffer if "b" in mode else sys.stdout
        return
    try:
        file = output.open(mode)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from error
    with file:
        yield file
