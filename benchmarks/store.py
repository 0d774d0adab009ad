"""How fast, small and quick to recover is the span store? All through its Ray actor, every write durable.

    python -m benchmarks.store            a million spans stored (about 8 minutes on 2 cores, 12 GB of disk)
    python -m benchmarks.store --quick    100,000 spans stored (about 2 minutes)

Rates are medians of three windows that follow each other, with compaction running beside as it always does. Query
times are of all spans of one random rollout (10 spans), one at a time. Sizes count everything in the store's folder,
and the process' resident memory with what it has looked at of Ray's object store (``rss_own_...`` is without). Ray
gives its workers nice 15, so anything else at work on the machine shows. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.store_figures import FULL, QUICK, Figures, measure


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="100,000 spans rather than a million, shorter windows")
    quick = arguments.parse_args().quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with cluster() as folder, contextlib.redirect_stdout(sys.stderr), bar() as progress:
        figures = asyncio.run(measure(folder, QUICK if quick else FULL, progress))
    figures |= circumstances(quick)
    show(figures)
    print(json.dumps(figures))


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """A Ray of our own and a folder for everything; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lr-"))
    try:
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=300_000_000,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder / "ray"),
        )
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def bar() -> Progress:
    """One line for each figure, on standard error."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def circumstances(quick: bool) -> Figures:
    """Where, when and with what this was measured."""
    memory = psutil.virtual_memory().total / 2**30
    return {
        "quick": quick,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores ({processor()}), {memory:.0f} GiB",
        "load_average_15min": round(os.getloadavg()[2], 2),
        "ray": ray.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


class Goal(NamedTuple):
    """What a figure is to be: at least, or at most."""

    key: str
    target: float
    stretch: float | None = None
    least: bool = False


def goals(figures: Figures) -> list[Goal]:
    """The goals of the figures measured; sizes are measured by the bytes as Arrow."""
    large = "1m" if "query_ms_p50_1m" in figures else "100k"
    raw = figures["raw_bytes_per_span"]
    return [
        Goal("ingest_spans_per_s_batch64", 10_000, 40_000, least=True),
        Goal("ingest_spans_per_s_single", 1_500, 4_000, least=True),
        Goal("cycles_per_s", 1_000, 4_000, least=True),
        Goal("query_ms_p50_10k", 3, 1),
        Goal(f"query_ms_p50_{large}", round(min(3, 1.5 * figures["query_ms_p50_10k"]), 2), 1),
        Goal("rss_bytes_per_span", round(0.15 * raw)),
        Goal("disk_bytes_per_span", round(0.6 * raw)),
        Goal("recovery_s_per_million_spans", 10, 3),
        Goal("multi_turn_storage_ratio", 1.5, 1.1),
    ]


def show(figures: Figures) -> None:
    """The table of figures with goals, and the others."""
    table = Table(title=f"the span store, {figures['machine']}, {figures['date']}")
    for column in ("figure", "measured", "target", "stretch", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right", no_wrap=True)
    others = Table(title="other figures", show_header=False)
    for goal in goals(figures):
        value, sign = figures[goal.key], "≥" if goal.least else "≤"
        stretch = "" if goal.stretch is None else f"{sign} {goal.stretch:,}"
        table.add_row(goal.key, f"{value:,}", f"{sign} {goal.target:,}", stretch, verdict(value, goal))
    for key in sorted(figures.keys() - {goal.key for goal in goals(figures)}):
        others.add_row(key, str(figures[key]))
    console = Console(width=100)
    console.print(table)
    console.print(others)


def verdict(value: float, goal: Goal) -> str:
    """Whether a goal is met."""

    def met(limit: float) -> bool:
        return value >= limit if goal.least else value <= limit

    if goal.stretch is not None and met(goal.stretch):
        return "stretch met"
    return "met" if met(goal.target) else "NOT MET"


if __name__ == "__main__":
    main()
