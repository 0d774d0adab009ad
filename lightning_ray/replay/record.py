"""What a run's folder tells of its steps: which rollouts each settled, under which weights, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import PROGRESS, STATE
from lightning_ray.run.folder import STEPS, RunFolder

UPDATE = "update."


@dataclass(frozen=True)
class StepRecord:
    """One step as the run settled it."""

    step: int
    version: int
    """Of the weights that it trained."""
    groups: Sequence[tuple[str, Sequence[str]]]
    """Group ids with their rollouts' ids, in order; those that were played again later are among them."""
    trained: int
    """Rollouts that it trained on."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the update told of itself."""
    advantages: Mapping[str, float] = field(default_factory=dict)
    """By rollout, where the algorithm gave them."""

    @property
    def group_of(self) -> dict[str, str]:
        """Rollout id -> group id, in order."""
        return {rollout_id: group_id for group_id, rollout_ids in self.groups for rollout_id in rollout_ids}


def read_steps(run: RunFolder) -> dict[int, StepRecord]:
    """The steps that were settled and trained to their end, by number."""
    settled = run.steps()
    records = {}
    for row in run.metrics():
        line = settled.get(row["step"])
        if row["kind"] == "train" and line is not None:
            groups = [(group_id, tuple(rollout_ids)) for group_id, rollout_ids in line["groups"]]
            records[row["step"]] = StepRecord(
                row["step"], line["version"], groups, line["trained"], _update_figures(row), line.get("advantages", {})
            )
    return records


def _update_figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix(UPDATE): float(value)
        for name, value in row.items()
        if name.startswith(UPDATE) and isinstance(value, int | float)
    }


@dataclass(frozen=True)
class Beginning:
    """Weights and optimizer before step ``step``. Without a checkpoint they are the initial ones."""

    step: int = 0
    checkpoint: Path | None = None

    def __str__(self) -> str:
        return "the initial model" if self.checkpoint is None else f"checkpoints/step-{self.step:06d}"


def beginning(run: RunFolder, step: int) -> Beginning:
    """Where to begin so as to come to ``step``: the checkpoint there, the last before it, or the initial model."""
    found = [Beginning()]
    for number, folder in run.kept().items():
        part = run.part(folder)
        if number <= step and (part / STATE / PROGRESS).is_file():
            found.append(Beginning(number, part))
    return max(found, key=lambda each: (each.step, each.checkpoint is not None))


def chain(run: RunFolder, step: int) -> tuple[Beginning, list[StepRecord]]:
    """Where to begin, and the steps to train from there: the last is ``step``.

    Those that trained nothing are left out. Raises ConfigError if there is no such step, it trained nothing, or one on
    the way is not recorded.
    """
    records = read_steps(run)
    if not records:
        raise ConfigError(
            f"{run.path / STEPS}: no step is recorded there that was trained to its end; a run notes there what it "
            "settles, and a store alone does not tell which rollouts made a step"
        )
    if step not in records:
        raise ConfigError(
            f"--step {step}: there is no such step in {run.path}; recorded are {min(records)} to {max(records)}"
        )
    if not records[step].trained:
        raise ConfigError(
            f"--step {step} trained nothing: no group of its rollouts could be used; `lightning-ray doctor {run.path} "
            f"--step {step}` says why"
        )
    start = beginning(run, step)
    missing = [number for number in range(start.step, step) if number not in records]
    if missing:
        raise ConfigError(
            f"--step {step} cannot be replayed: the last weights before it are {start}, and of the steps between, "
            f"{missing} are not recorded in {run.path / STEPS}; choose a step behind a checkpoint, of which a run "
            "keeps the last ones (algorithm.keep_checkpoints)"
        )
    return start, [records[number] for number in range(start.step, step + 1) if records[number].trained]
