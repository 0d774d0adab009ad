"""A thousand to ten thousand rollouts at once: what do store, driver and runners take, and where does it bend?

    python -m benchmarks.scale            concurrency, shards and nodes in turn (about 10 minutes on 2 cores)
    python -m benchmarks.scale --quick    1,000 and 10,000 at once, one shard (about 2 minutes)
    python -m benchmarks.scale --plan gpus=1000 rollouts=100000 [costs=FILE]

Agents are simulated (``scale_agent``), all else is real: runners, store, and the driver's side of a run
(``scale_point``). ``..._growth`` is what a rollout costs with 10,000 at once over what it costs with 1,000. The last
line of the output is one JSON object; a full run also writes scale.json and scale.png beside this file. ``--plan``
runs nothing: it reckons from measured costs what a deployment needs (``scale_plan``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.report import show
from benchmarks.scale_point import Figures, Point, Window, measure
from benchmarks.scale_ray import ray_of
from benchmarks.store import Goal, circumstances
from lightning_ray.errors import ConfigError

GOALS = (
    Goal("rollouts_per_s_10k_concurrent", 300, least=True),
    Goal("driver_cpu_ms_per_rollout", 1.0),
    Goal("store_cpu_ms_per_rollout", 1.5),
    Goal("driver_cpu_growth", 1.3),
    Goal("store_cpu_growth", 1.3),
)
FEW, MANY = Point(1_000), Point(10_000)
QUICK = (FEW, MANY)
FULL = (
    FEW,
    Point(3_000),
    MANY,
    Point(20_000),
    *(Point(10_000, shards=shards) for shards in (2, 4, 8)),
    *(Point(10_000, nodes=nodes, line=False) for nodes in (1, 2, 4)),
)
"""Nodes are simulated on one machine; real ones have no line to the store but Ray, so these have none either."""
SHORT, QUICK_WINDOW = Window(settle=3.0, seconds=12.0), Window(settle=4.0, seconds=15.0)
LONG = Window(settle=60.0, seconds=60.0)
"""Of a full run's headline: log files that have rested for a minute are compacted in it."""
HERE = Path(__file__).parent
COLUMNS = {
    "rollouts/s": "rollouts_per_s",
    "at once": "peak_concurrent",
    "driver ms": "driver_cpu_ms_per_rollout",
    "store ms": "store_cpu_ms_per_rollout",
    "runner ms": "runners_cpu_ms_per_rollout",
    "raylet ms": "raylets_cpu_ms_per_rollout",
    "store MB": "store_pss_mb",
    "driver MB": "driver_pss_mb",
    "runner MB": "runners_pss_mb",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="1,000 and 10,000 at once alone")
    arguments.add_argument("--plan", nargs="*", metavar="NAME=VALUE", help="reckon what a deployment needs")
    given = arguments.parse_args()
    if given.plan is not None:
        from benchmarks.scale_plan import main as plan

        try:
            plan(given.plan)
        except ConfigError as error:
            sys.exit(str(error))
        return
    logging.getLogger("actors.runner_pool").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.redirect_stdout(sys.stderr), bar() as progress:
        points = measured(QUICK if given.quick else FULL, given.quick, progress)
    figures = {**headline(points), **circumstances(given.quick), "points": points}
    if not given.quick:
        (HERE / "scale.json").write_text(json.dumps(figures, indent=1) + "\n")
        draw(points, HERE / "scale.png")
    show("scale", GOALS, {key: value for key, value in figures.items() if key != "points"})
    show_points(points)
    print(json.dumps(figures))


def measured(points: Sequence[Point], quick: bool, progress: Progress) -> list[Figures]:
    """The points' figures; those of as many nodes share a Ray."""
    found = []
    for nodes in sorted({point.nodes for point in points}):
        with ray_of(nodes) as folder:
            for point in (point for point in points if point.nodes == nodes):
                line = progress.add_task(str(point), total=None, told="starts")

                def tell(told: str, line: Any = line) -> None:
                    progress.update(line, told=told)
                    progress.refresh()

                window = QUICK_WINDOW if quick else LONG if point == MANY else SHORT
                found.append(asyncio.run(measure(folder, point, window, tell)))
                progress.update(line, total=1, completed=1)
                tell(f"{found[-1]['rollouts_per_s']} rollouts/s")
    return found


def bar() -> Progress:
    """A line for each point, drawn when something is told: drawing it all the time would be the driver's CPU."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<34}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False)


def headline(points: Sequence[Figures]) -> Figures:
    """The figures with goals, of the points at 1,000 and at 10,000."""
    few, many = (next(each for each in points if _of(each) == point) for point in (FEW, MANY))
    figures = {"rollouts_per_s_10k_concurrent": many["rollouts_per_s"], "peak_concurrent": many["peak_concurrent"]}
    for part in ("driver", "store"):
        cost = f"{part}_cpu_ms_per_rollout"
        figures |= {cost: many[cost], f"{part}_cpu_growth": round(many[cost] / few[cost], 2)}
    return figures


def _of(figures: Figures) -> Point:
    return Point(*(figures[name] for name in Point._fields))


def show_points(points: Sequence[Figures]) -> None:
    """A row for each point; CPU a rollout, memory of all processes of a part."""
    table = Table(title="by concurrency, shards and nodes")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(str(_of(point)), *(f"{point[name]:,}" for name in COLUMNS.values()))
    Console(width=140).print(table)


def draw(points: Sequence[Figures], path: Path) -> None:
    """Rollouts a second and CPU a rollout against rollouts at once, with one shard on one node."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = sorted((p for p in points if _of(p)[1:] == FEW[1:]), key=lambda p: p["concurrency"])
    at_once = [p["concurrency"] for p in shown]
    figure, (rates, costs) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    first = shown[0]["rollouts_per_s"] / at_once[0]
    rates.plot(at_once, [first * number for number in at_once], "--", color="0.7", label="as at 1,000")
    rates.plot(at_once, [p["rollouts_per_s"] for p in shown], "o-", label="measured")
    rates.set(xlabel="rollouts at once", ylabel="rollouts/s")
    for part in ("driver", "store", "runners"):
        costs.plot(at_once, [p[f"{part}_cpu_ms_per_rollout"] for p in shown], "o-", label=part)
    costs.set(xlabel="rollouts at once", ylabel="CPU ms a rollout", ylim=0)
    for axes in (rates, costs):
        axes.legend(frameon=False)
        axes.set_xticks(at_once, [f"{number // 1000}k" for number in at_once])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
