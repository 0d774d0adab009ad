"""Training recorded steps again, in this process: from a checkpoint over the steps on the way to the one asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch

from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.replay.record import Beginning, StepRecord
from lightning_ray.replay.updater import ReplayUpdater

Rebuild = Callable[[StepRecord], pa.Table]


@dataclass(frozen=True)
class Alternative:
    """Other settings for the last step, and its batch under them."""

    settings: UpdateSettings
    batch: pa.Table


@dataclass
class Replayed:
    """Figures of updates."""

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Of each step, under the run's settings."""
    changed: dict[str, float] | None = None
    """Of the last, under others."""


def train_again(
    settings: UpdateSettings,
    start: Beginning,
    records: Sequence[StepRecord],
    rebuild: Rebuild,
    alternative: Alternative | None = None,
    threads: int = 1,
) -> Replayed:
    """Train the steps in turn; the last under other settings too, from the same weights."""
    torch.set_num_threads(threads)
    replayed = Replayed()
    updater = ReplayUpdater(settings)
    with tempfile.TemporaryDirectory(prefix="lightning-ray-replay-") as folder:
        try:
            if start.checkpoint is not None:
                updater.load(str(start.checkpoint))
            for record in records:
                if alternative is not None and record is records[-1]:
                    updater.save(folder)
                replayed.steps[record.step] = updater.update(rebuild(record), record.version)
        finally:
            updater.close()
        del updater
        if alternative is not None:
            replayed.changed = _train_otherwise(alternative, Path(folder), records[-1].version)
    return replayed


def _train_otherwise(alternative: Alternative, weights: Path, version: int) -> dict[str, float]:
    updater = ReplayUpdater(alternative.settings)
    try:
        updater.load(str(weights))
        return updater.update(alternative.batch, version)
    finally:
        updater.close()
