"""Does it learn? The SQL example through the whole real loop, on fresh seeds, and a control without the tool's hint.

    python -m benchmarks.learning            three seeds and the control (about 12 minutes on 2 cores)
    python -m benchmarks.learning --quick    one seed

Figures are of the held-out test questions (144). ``corrected``: share of failing queries, with a turn left, whose next
query runs, decoded greedily.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

SEEDS = (101, 102, 103)
FIGURES = ("sampled", "greedy", "corrected")
LIMIT_SECONDS = 1200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="one seed, no control")
    quick = arguments.parse_args().quick
    runs = {f"seed {seed}": train(seed) for seed in (SEEDS[:1] if quick else SEEDS)}
    control = None if quick else train(SEEDS[0], "--no-hint")
    show(runs, control)
    print(json.dumps(figures(list(runs.values()), control)))


def train(seed: int, *options: str) -> dict[str, Any]:
    """One run of the example in a process of its own; returns its summary."""
    with tempfile.TemporaryDirectory(prefix="lr-learning-") as folder:
        example = Path("examples/sql").absolute()
        command = [sys.executable, "-m", "lightning_ray.cli", "train", str(example), "--name", "learning"]
        command += ["--runs-dir", folder, "--", "--seed", str(seed), *options]
        subprocess.run(command, check=True, timeout=LIMIT_SECONDS, stdout=sys.stderr)
        summary: dict[str, Any] = json.loads((Path(folder) / "learning" / "summary.json").read_text())
        return summary


def figures(runs: list[dict[str, Any]], control: dict[str, Any] | None) -> dict[str, Any]:
    """Means over the seeds, on the test questions."""
    result: dict[str, Any] = {"seeds": len(runs)}
    for name in FIGURES:
        before, after = ([run["test"][f"{name}_{moment}"] for run in runs] for moment in ("before", "after"))
        result[f"test_{name}_before"] = round(fmean(before), 3)
        result[f"test_{name}_after"] = round(fmean(after), 3)
        result[f"test_{name}_gain_least"] = round(min(a - b for a, b in zip(after, before, strict=True)), 3)
        if control is not None:
            result[f"control_{name}_after"] = round(control["test"][f"{name}_after"], 3)
    result["seconds_mean"] = round(fmean(run["seconds_total"] for run in runs), 1)
    result["max_logprob_diff"] = max(run["max_logprob_diff"] for run in runs)
    result["peak_memory_gb"] = max(run["peak_memory_gb"] for run in runs)
    return result


def show(runs: dict[str, dict[str, Any]], control: dict[str, Any] | None) -> None:
    """The table."""
    table = Table(title="held-out test, before -> after")
    for column in ("", *FIGURES, "seconds", "GB"):
        table.add_column(column)
    rows = runs | ({"control, no hint": control} if control else {})
    for name, run in rows.items():
        cells = [f"{run['test'][f'{f}_before']:.2f} -> {run['test'][f'{f}_after']:.2f}" for f in FIGURES]
        table.add_row(name, *cells, f"{run['seconds_total']:.0f}", f"{run['peak_memory_gb']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
