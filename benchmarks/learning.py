"""Does it learn? The SQL example through the whole real loop, on fresh seeds, and a control without the tool's hint;
beside it SFT on the policy's own best rollouts, and GRPO that begins with the model of that; and the example with two
agents, of which the writer alone is trained.

    python -m benchmarks.learning                three seeds and the control (about 30 minutes on 2 cores)
    python -m benchmarks.learning --quick        one seed, no control
    python -m benchmarks.learning --only sft     SFT and GRPO after SFT; or --only grpo, --only two-agents

Figures are of the held-out test questions (144). ``corrected``: share of failing queries, with a turn left, whose next
query runs, decoded greedily.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

SEEDS = (101, 102, 103)
PARTS = ("grpo", "sft", "two-agents")
FIGURES = ("sampled", "greedy", "corrected")
TWO_AGENT_FIGURES = ("sampled", "greedy", "right")
"""``right``: the share of the checker's verdicts that were, decoded greedily."""
LIMIT_SECONDS = 1200
ARMS = ("sft", "sft-then-grpo")
"""Of ``examples.sql.compare``."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="one seed, no control")
    arguments.add_argument("--only", choices=PARTS, help="one part of it")
    given = arguments.parse_args()
    seeds = SEEDS[:1] if given.quick else SEEDS
    parts = PARTS if given.only is None else (given.only,)
    result: dict[str, Any] = {"seeds": len(seeds)}
    if "grpo" in parts:
        runs = {f"seed {seed}": train(seed) for seed in seeds}
        control = None if given.quick else train(SEEDS[0], "--no-hint")
        show(runs, control)
        result |= figures(list(runs.values()), control)
    if "sft" in parts:
        imitating = {f"{arm}, seed {seed}": run for seed in seeds for arm, run in imitate(seed).items()}
        show(imitating, None)
        result |= imitation_figures(imitating)
    if "two-agents" in parts:
        writing = {f"writer alone, seed {seed}": train_writer(seed) for seed in seeds}
        show(writing, None, TWO_AGENT_FIGURES)
        result |= two_agent_figures(list(writing.values()))
    print(json.dumps(result))


def train(seed: int, *options: str, example: str = "sql", settings: Sequence[str] = ()) -> dict[str, Any]:
    """One run of an example in a process of its own; returns its summary."""
    with tempfile.TemporaryDirectory(prefix="lr-learning-") as folder:
        path = Path("examples", example).absolute()
        command = [sys.executable, "-m", "lightning_ray.cli", "train", str(path), "--name", "learning"]
        for setting in settings:
            command += ["--set", setting]
        command += ["--runs-dir", folder, "--", "--seed", str(seed), *options]
        subprocess.run(command, check=True, timeout=LIMIT_SECONDS, stdout=sys.stderr)
        summary: dict[str, Any] = json.loads((Path(folder) / "learning" / "summary.json").read_text())
        return summary


def train_writer(seed: int) -> dict[str, Any]:
    """One run of two agents, of which the checker stays as it is."""
    return train(seed, example="sql_two_agents", settings=["algorithm.policies.checker.trainable=false"])


def two_agent_figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, on the test questions, where the writer alone was trained. The gain is that of the success
    of rollouts that both agents sample as they are.
    """
    result: dict[str, Any] = {}
    for name in TWO_AGENT_FIGURES:
        before, after = ([run["test"][f"{name}_{moment}"] for run in runs] for moment in ("before", "after"))
        result[f"two_agent_writer_only_{name}_before"] = round(fmean(before), 3)
        result[f"two_agent_writer_only_{name}_after"] = round(fmean(after), 3)
    gains = [run["test"]["sampled_after"] - run["test"]["sampled_before"] for run in runs]
    seconds = round(fmean(run["seconds_total"] for run in runs), 1)
    return {**result, "two_agent_writer_only_gain": round(fmean(gains), 3), "two_agent_seconds_mean": seconds}


def imitate(seed: int) -> dict[str, dict[str, Any]]:
    """SFT and GRPO after it, in processes of their own; returns their summaries."""
    with tempfile.TemporaryDirectory(prefix="lr-learning-") as folder:
        for arm in ARMS:
            command = [sys.executable, "-m", "examples.sql.compare", "--only", arm, "--seed", str(seed)]
            command += ["--runs-dir", folder]
            subprocess.run(command, check=True, timeout=LIMIT_SECONDS, stdout=sys.stderr)
        runs = Path(folder) / f"compare-{seed}"
        return {arm: json.loads((runs / arm / "summary.json").read_text()) for arm in ARMS}


def imitation_figures(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, on the test questions; those of GRPO after SFT begin where SFT ended."""
    result: dict[str, Any] = {}
    for arm, name in zip(ARMS, ("sft", "grpo_after_sft"), strict=True):
        of_arm = [run for title, run in runs.items() if title.startswith(f"{arm},")]
        for figure in FIGURES:
            for moment in ("before", "after"):
                mean = fmean(run["test"][f"{figure}_{moment}"] for run in of_arm)
                result[f"{name}_test_{figure}_{moment}"] = round(mean, 3)
        result[f"{name}_rollouts"] = round(fmean(run["rollouts"] for run in of_arm))
        result[f"{name}_seconds_mean"] = round(fmean(run["seconds_total"] for run in of_arm), 1)
    return result


def figures(runs: list[dict[str, Any]], control: dict[str, Any] | None) -> dict[str, Any]:
    """Means over the seeds, on the test questions."""
    result: dict[str, Any] = {}
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


def show(runs: dict[str, dict[str, Any]], control: dict[str, Any] | None, figures: Sequence[str] = FIGURES) -> None:
    """The table."""
    table = Table(title="held-out test, before -> after")
    for column in ("", *figures, "seconds", "GB"):
        table.add_column(column)
    rows = runs | ({"control, no hint": control} if control else {})
    for name, run in rows.items():
        cells = [f"{run['test'][f'{f}_before']:.2f} -> {run['test'][f'{f}_after']:.2f}" for f in figures]
        table.add_row(name, *cells, f"{run['seconds_total']:.0f}", f"{run['peak_memory_gb']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
