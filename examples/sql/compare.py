"""Three ways to train on the same task, side by side: GRPO, SFT on the policy's own best rollouts, and GRPO after SFT.

    python -m examples.sql.compare                     all three (about 8 minutes on 2 cores)
    python -m examples.sql.compare --only sft          one of them; the table and the picture have what is there

Each begins with the same model, taught the format by demonstrations. SFT plays the training tasks, keeps the rollouts
that were right, trains on what was sampled in them, and plays again: three rounds. GRPO after SFT begins with the last
of these models.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning_ray as lr
from examples.sql.agent import sql_agent
from examples.sql.task import make_tasks
from lightning_ray.run.folder import RunFolder

GROUP, PROMPTS = 8, 16
ENGINE = lr.EngineSettings(max_model_len=256, max_num_seqs=128, kv_cache_memory_mb=64)
COMMON: dict[str, Any] = {"group_size": GROUP, "rollout_timeout_seconds": 60, "engine": ENGINE}
FIGURES = ("sampled", "greedy", "corrected")


def grpo(model: Path, steps: int, seed: int, **more: Any) -> lr.Algorithm:
    """As in examples/sql/train.py."""
    given = {"learning_rate": 6e-4, "minibatch_rollouts": 64, "validate_every": 2, **COMMON, **more}
    return lr.GRPO(model=model, steps=steps, prompts_per_step=PROMPTS, seed=seed, **given)


def grpo_after_sft(model: Path, steps: int, seed: int) -> lr.Algorithm:
    """Gentler, and groups whose rewards are all the same, as most are by then, are played again (as DAPO does)."""
    batch = lr.BatchSettings(groups=lr.GroupPolicy(no_variance="resample"))
    return grpo(model, steps, seed, learning_rate=3e-4, batch=batch)


def sft(model: Path, rounds: int, seed: int) -> lr.Algorithm:
    """Rounds of four times as many tasks as a step of GRPO has."""
    keep = lr.Keep(min_reward=1.0)
    rates: dict[str, Any] = {"learning_rate": 1e-3, "minibatch_rollouts": 32, "epochs": 2}
    return lr.SFT(model=model, steps=rounds, prompts_per_step=4 * PROMPTS, keep=keep, seed=seed, **rates, **COMMON)


@dataclass(frozen=True)
class Arm:
    """One way. ``begins`` names the arm whose last model it begins with, if not the warm start."""

    make: Callable[[Path, int, int], lr.Algorithm]
    steps: int
    begins: str | None = None


ARMS = {"grpo": Arm(grpo, 20), "sft": Arm(sft, 3), "sft-then-grpo": Arm(grpo_after_sft, 8, "sft")}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=0, help="of databases, model and training")
    arguments.add_argument("--only", choices=[*ARMS], help="train one of the three")
    arguments.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the folder of all is made")
    given = arguments.parse_args()
    folder = given.runs_dir.absolute() / f"compare-{given.seed}"
    for name in [given.only] if given.only else ARMS:
        train(name, folder, given.seed)
    summaries = {name: summary for name in ARMS if (summary := read_summary(folder, name))}
    show(summaries)
    plot(folder, [*summaries])
    print(json.dumps({name: summary["test"] for name, summary in summaries.items()}))


def train(name: str, folder: Path, seed: int) -> None:
    """Train one of the arms; its run is ``folder/name``."""
    arm = ARMS[name]
    model: Path | None = folder / "model"
    if arm.begins is not None:
        model = RunFolder(folder / arm.begins).latest_checkpoint()
        if model is None:
            raise SystemExit(f"{name} begins with the model of {arm.begins}: train that first (--only {arm.begins})")
    elif not (folder / "model").exists():
        from examples.sql.warm_start import warm_start

        warm_start(folder / "model", seed)
    assert model is not None
    train_tasks, val, test = make_tasks(seed)
    trainer = lr.Trainer(algorithm=arm.make(model, arm.steps, seed), n_runners=2, name=name, runs_dir=folder)
    trainer.fit(sql_agent, train_tasks, val_dataset=val, test_dataset=test)


def read_summary(folder: Path, name: str) -> dict[str, Any] | None:
    """What a finished arm came to."""
    file = folder / name / "summary.json"
    summary: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return summary


def show(summaries: dict[str, dict[str, Any]]) -> None:
    """The table. Rollouts and seconds of an arm are with those of the one it begins with."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="144 held-out questions, before -> after", title_justify="left")
    for column in ("", "rollouts", "trained on", *FIGURES, "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, summary in summaries.items():
        first = summaries.get(ARMS[name].begins or "", {})
        totals = {key: summary[key] + first.get(key, 0) for key in ("rollouts", "rollouts_trained", "seconds_total")}
        start = first.get("test", summary["test"])
        cells = [f"{start[f'{each}_before']:.2f} -> {summary['test'][f'{each}_after']:.2f}" for each in FIGURES]
        table.add_row(
            name, f"{totals['rollouts']}", f"{totals['rollouts_trained']}", *cells, f"{totals['seconds_total']:.0f}"
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def plot(folder: Path, names: list[str]) -> None:
    """compare.png: validation and training reward over the rollouts played; an arm goes on where another ended."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axes, kind, title in zip(panels, ("val", "train"), ("validation, greedy", "training, sampled"), strict=True):
        for name in names:
            style = "--" if ARMS[name].begins else "-"
            axes.plot(*curve(folder, name, kind), style, marker="o", markersize=4, label=name)
        axes.set(xlabel="rollouts played for training", title=title, ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean reward")
    panels[0].legend(loc="lower right")
    figure.savefig(folder / "compare.png", dpi=150)
    plt.close(figure)
    print(f"the picture is {folder / 'compare.png'}")


def curve(folder: Path, name: str, kind: str) -> tuple[list[int], list[float]]:
    """Rollouts played, those of an arm's beginning included, and the greedy validations or the rewards of the steps."""
    begins, count = ARMS[name].begins, 0
    if begins is not None:
        count = sum(row["rollouts"] for row in RunFolder(folder / begins).metrics() if row["kind"] == "train")
    played, rewards = [], []
    for row in RunFolder(folder / name).metrics():
        if row["kind"] == kind and row.get("mode") in (None, "greedy"):
            played.append(count)
            rewards.append(row["reward"])
        if row["kind"] == "train":
            count += row["rollouts"]
    return played, rewards


if __name__ == "__main__":
    main()
