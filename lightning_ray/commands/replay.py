"""``lightning-ray replay``: a recorded step of a run trained again, in this process, and its figures beside the run's.

Reads the run's folder; no engine, no Ray, and nothing of the run is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.commands.spans import add_folder_argument, store_folder
from lightning_ray.errors import ConfigError

if TYPE_CHECKING:
    from lightning_ray.replay.trial import Result

WIDTH = 110


def add_replay_command(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "replay",
        help="train a recorded step again, with the same or other settings",
        description="Train one step of a run again from its store, without engine and Ray: the same figures with the "
        "same settings (exit code 1 if not), a comparison with others.",
    )
    add_folder_argument(command, nargs="?")
    command.add_argument("--step", type=int, required=True, metavar="N", help="the step, from 0")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting, e.g. algorithm.loss=cispo"
    )
    command.add_argument("--model", type=Path, metavar="FOLDER", help="where the initial model is now, if it moved")
    command.add_argument("--policy", metavar="NAME", help="of several policies (default: the first that is trained)")
    command.add_argument("--device", choices=("cpu", "cuda"), help="where to train (default: as the run did)")
    command.add_argument("--tolerance", type=float, metavar="X", help="how far a figure may be from the run's")
    command.add_argument("--json", action="store_true", help="one JSON object")


def replay(given: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError and StoreError for what the user can mend."""
    from lightning_ray.replay.trial import Request, try_again

    store = store_folder(given.folder, weights=True)
    run = store.parent if store.name == "store" else store
    if given.tolerance is not None and given.tolerance < 0:
        raise ConfigError(f"--tolerance {given.tolerance:g}: give a number of at least 0")
    # As many threads as a trainer rank has: the sums of others come in another order.
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", "1").split(",")[0])
    with stdout_on_stderr():
        places = (given.model, given.device, given.policy)
        request = Request(run, store, given.step, given.set, *places, given.tolerance, threads)
        result = try_again(request)
    try:
        if given.json:
            print(json.dumps(as_json(result)))
        else:
            print_comparison(result)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has had enough, as in ``| head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if result.agrees or given.set else 1


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """What libraries print, in native code too, is no answer of ours."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def as_json(result: Result) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "run": str(result.request.run),
        "step": result.request.step,
        "from": str(result.start),
        "from_step": result.start.step,
        "ranks": result.ranks,
        "set": list(result.request.changes),
        "tolerance": result.tolerance,
        "agrees": result.agrees,
        "differing": {str(step): names for step, names in result.differing.items()},
        "trained_otherwise": {str(step): pair for step, pair in result.recounted.items()},
        "figures": {line.name: {k: v for k, v in asdict(line).items() if k != "name"} for line in result.lines},
    }


def print_comparison(result: Result) -> None:
    """A table, and below it what does not agree."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    table = Table(
        title=f"step {result.request.step} of {result.request.run}, from {result.start}", title_justify="left"
    )
    columns = ["figure", "recorded", "recorded settings" if result.request.changes else "replayed"]
    columns += ["changed settings"] * bool(result.request.changes) + ["difference"]
    for column in columns:
        table.add_column(column, justify="left" if column == "figure" else "right")
    for line in result.lines:
        values = [line.recorded, line.replayed, *([line.changed] * bool(result.request.changes))]
        table.add_row(line.name, *map(number, values), number(line.difference, 3))
    console.print(table)
    if result.request.changes:
        console.print(f"changed: {', '.join(result.request.changes)}", markup=False)
    for remark in remarks(result):
        console.print(remark, markup=False)


def remarks(result: Result) -> list[str]:
    """In words, whether the figures are the run's, and where not."""
    told = []
    for step, (then, now) in sorted(result.recounted.items()):
        told.append(
            f"step {step}: the run trained on {then} rollouts, of the store {now} can be: spans came in after the step "
            "was settled, or the run went on with other settings"
        )
    if result.agrees:
        return [*told, f"Replayed, the figures are the run's, to {result.tolerance:g}."]
    for step, names in sorted(result.differing.items()):
        told.append(f"step {step}: not the run's figures, to {result.tolerance:g}: {', '.join(names)}")
    if min(result.differing) < result.request.step:
        told.append("A step on the way differs: the weights before the last step are not those of the run.")
    return told


def number(value: float | None, digits: int = 7) -> str:
    """A figure in so many digits."""
    return "" if value is None else f"{value:.{digits}g}"
