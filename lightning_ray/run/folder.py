"""A run's folder: what was asked, what happened, what came out. It explains itself.

config.json      the resolved settings            metrics.jsonl    one line for each step and validation
tensorboard/     the same as curves               reward.png       the curve to look at first
training.png     the training; of several policies training.NAME.png
steps.jsonl      the rollouts of each step
checkpoints/     step-000030/ in Hugging Face format, with the state of the training; ``latest`` names the last
store/           every span and rollout           summary.json     the figures at the end
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError
from lightning_ray.run.state import ONLY

README = """# Run {name}

| file | what it holds |
|---|---|
| `summary.json` | the figures at the end |
| `reward.png` | reward and validation over the steps |
| `training.png`, `training.NAME.png` | beside them entropy, lengths, staleness, where the time went, and swaps |
| `metrics.jsonl` | one JSON object for each step and each validation |
| `tensorboard/` | the same for `tensorboard --logdir`; `wandb/` for W&B, if it was asked for |
| `steps.jsonl` | for each step the groups of rollouts that it settled, in order, and the version of the weights |
| `events.jsonl` | what else happened: parts that died, and why; steps that took long, and what everyone was at |
| `report.html`, `best/` | where prompts were optimised: every candidate with its critique, and the best templates |
| `config.json` | the resolved settings |
| `owner.json` | who works on it, or did last: process, host and Ray job |
| `ray.json` | while it runs: Ray's address and namespace, and the name of the store's actor |
| `checkpoints/` | the last models and the best validated, in Hugging Face format, each with the state of its training |
| `model/`, `models/NAME/` | the model that it began with, if it made one itself |
| `store/` | every rollout and span: `lightning-ray spans "SELECT ..." FOLDER`, or `lightning_ray.store.open_folder` |

`lightning-ray doctor FOLDER` tells what became of every rollout, and why some gave no training data.
`lightning-ray replay FOLDER --step N` trains a step again from the store, with the same or other settings.
Continue it with `lightning-ray train ... --name {name} --resume`.
"""
KEEP_CHECKPOINTS = 3
"""Of algorithms that have no setting of that name."""
METRICS = "metrics.jsonl"
STEPS = "steps.jsonl"


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.store = path / "store"
        self.checkpoints = path / "checkpoints"
        self.policy: str | None = None
        """As which of several policies it is read."""

    def create(self, resume: bool) -> None:
        """Make the folder, or take up an old one. Raises ConfigError if there is nothing to resume.

        A folder of that name that is not resumed is kept under a name with its time.
        """
        if resume:
            if self.latest_checkpoint() is None:
                raise ConfigError(f"--resume: {self.path} has no finished checkpoint; start the run without --resume")
        else:
            self.set_aside()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / "README.md").write_text(README.format(name=self.path.name))

    def create_for_evaluation(self, readme: str) -> None:
        """Make the folder of an evaluation, which its README explains; one of that name is kept as a run's is."""
        self.set_aside()
        self.path.mkdir(parents=True)
        (self.path / "README.md").write_text(readme.format(name=self.path.name))

    def set_aside(self) -> None:
        """Keep a folder of this name, if there is one, under a name with its time."""
        if not self.path.exists():
            return
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.path.stat().st_mtime))
        kept = self.path.with_name(f"{self.path.name}-{stamp}")
        for number in range(2, 100):
            if not kept.exists():
                break
            kept = self.path.with_name(f"{self.path.name}-{stamp}-{number}")
        self.path.rename(kept)

    def latest_checkpoint(self) -> Path | None:
        """The folder of the last whole checkpoint."""
        pointer = self.checkpoints / "latest"
        if not pointer.is_file():
            return None
        folder = self.checkpoints / pointer.read_text().strip()
        return folder if folder.is_dir() else None

    def model_of(self, policy: str) -> Path:
        """Where a model that the run makes for a policy goes."""
        return self.path / "model" if policy == ONLY else self.path / "models" / policy

    def model(self) -> Path:
        """Where the model is that the run made, if it did."""
        return self.model_of(ONLY)

    def part(self, checkpoint: Path) -> Path:
        """What of a checkpoint is the policy's."""
        return checkpoint

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` steps."""
        return self.checkpoints / f"step-{step:06d}"

    def begin_checkpoint(self, step: int) -> Path:
        """A fresh folder to write the checkpoint after ``step`` steps into."""
        folder = self.checkpoints / f".writing-{step:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def commit_checkpoint(self, folder: Path, step: int, state: dict[str, Any]) -> Path:
        """Make a written checkpoint the latest, in one step that a crash cannot split; drop the oldest."""
        folder.mkdir(exist_ok=True)  # all ranks may be on other nodes
        write_json(folder / "run_state.json", state)
        final = self.checkpoint(step)
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        pointer = self.checkpoints / ".latest"
        pointer.write_text(final.name)
        os.replace(pointer, self.checkpoints / "latest")
        there = self.kept()
        for old in self.superseded(there):
            shutil.rmtree(there[old], ignore_errors=True)
        return final

    def kept(self) -> dict[int, Path]:
        """The checkpoints that there are, by their steps."""
        there = {step_of(folder.name): folder for folder in sorted(self.checkpoints.glob("step-*"))}
        return {step: folder for step, folder in there.items() if step is not None}

    def superseded(self, steps: Collection[int]) -> set[int]:
        """Of the steps of these checkpoints those that need not be kept: the last ones stay, and the best."""
        older = set(sorted(steps)[: -settings_in(self.path).get("keep_checkpoints", KEEP_CHECKPOINTS)])
        try:
            return older and older - {self.best(steps)}
        except ValueError:  # a broken line in metrics.jsonl: which is the best is not known
            return set()

    def best(self, steps: Collection[int]) -> int | None:
        """Of these steps the one with the highest greedy validation reward, the latest of equals; None if none was
        validated.
        """
        rows = [row for row in self.metrics() if row.get("kind") == "val" and row.get("mode") == "greedy"]
        rewards = {row["step"]: row["reward"] for row in rows if row["step"] in steps and row["reward"] is not None}
        return max(rewards, key=lambda step: (rewards[step], step), default=None)

    def read_state(self) -> dict[str, Any]:
        """What the run knew at its latest checkpoint."""
        folder = self.latest_checkpoint()
        assert folder is not None
        state: dict[str, Any] = json.loads((folder / "run_state.json").read_text())
        return state

    def truncate_metrics(self, step: int) -> None:
        """Forget metrics and rollouts of what will be made again after a resume at ``step``.

        A training row has the step's number from 0, a validation row the number of steps before it.
        """
        for name in (METRICS, STEPS):
            file = self.path / name
            if file.exists():
                kept = [row for row in self._lines(name) if row["step"] < step + (row.get("kind", "train") != "train")]
                file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append_step(self, line: dict[str, Any]) -> None:
        """Add to steps.jsonl what a step is made of."""
        with (self.path / STEPS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def steps(self) -> dict[int, dict[str, Any]]:
        """The lines of steps.jsonl by step."""
        return {line["step"]: line for line in self._lines(STEPS)}

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._lines(METRICS)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """All whole lines of a file; a run that was killed may leave half a line at the end."""
        file = self.path / name
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def plot(self) -> None:
        """Draw reward.png and training.png, of several policies training.NAME.png each."""
        from lightning_ray.run.plots import plot_reward, plot_training
        from lightning_ray.run.policy_rows import policies_in, rows_of

        rows = self.metrics()
        plot_reward(rows, self.path / "reward.png", self.path.name)
        if not (policies := policies_in(rows)):
            plot_training(rows, self.path / "training.png", self.path.name)
        for policy in policies:
            picture = self.path / f"training.{policy}.png"
            plot_training(rows_of(rows, policy), picture, f"{self.path.name}, {policy}")

    def plot_interrupted(self) -> None:
        """Draw what a run that did not finish has, if a step was made since it was last drawn."""
        metrics, picture = self.path / METRICS, self.path / "reward.png"
        drawn = picture.stat().st_mtime_ns if picture.exists() else 0
        steps = metrics.exists() and any(row["kind"] == "train" for row in self.metrics())
        if steps and metrics.stat().st_mtime_ns > drawn:
            self.plot()


def settings_in(run: Path) -> dict[str, Any]:
    """The algorithm's settings in config.json; nothing if there are none."""
    file = run / "config.json"
    return (json.loads(file.read_text()).get("algorithm") or {}) if file.is_file() else {}


def step_of(name: str) -> int | None:
    """The number of steps behind a checkpoint, by its folder's name; None for what is none."""
    number = name.removeprefix("step-")
    return int(number) if number.isdigit() else None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(draft, path)
