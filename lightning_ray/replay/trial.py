"""One step of a run tried again: found in its folder, rebuilt from its store, trained, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.replay import settings as of
from lightning_ray.replay.batch import View, rebuild
from lightning_ray.replay.comparison import Line, compare, differing, tolerance_for
from lightning_ray.replay.record import Beginning, StepRecord, chain
from lightning_ray.run.folder import settings_in
from lightning_ray.run.policy_folder import folder_of
from lightning_ray.store.view import open_folder


@dataclass(frozen=True)
class Request:
    """What to try."""

    run: Path
    store: Path
    step: int
    changes: Sequence[str] = ()
    """Other settings, ``algorithm.NAME=VALUE``."""
    model: Path | None = None
    """Where the initial model is, if not where the run had it."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to train, if not as the run did."""
    policy: str | None = None
    """Of several; the first that is trained without one."""
    tolerance: float | None = None
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """What came of it."""

    request: Request
    start: Beginning
    ranks: int
    """Of the run."""
    tolerance: float
    lines: Sequence[Line]
    differing: dict[int, list[str]]
    """Step -> the figures that are not the run's, of the step and of those on the way."""
    recounted: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Step -> the rollouts that the run trained on, and those that the store gives, where these are not as many."""

    @property
    def agrees(self) -> bool:
        """Whether the replay under the run's settings has the run's figures."""
        return not self.differing


@dataclass
class Batches:
    """Batches of a store under some settings."""

    view: View
    settings: GRPO
    policy: str | None = None
    recounted: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, record: StepRecord) -> pa.Table:
        settings = self.settings
        limits = settings.batch, settings.max_staleness
        table = rebuild(self.view, record, *limits, settings.agent_match, self.policy)
        found = len(table["rollout_id"].unique())
        if found != record.trained:
            self.recounted[record.step] = (record.trained, found)
        return table


def try_again(request: Request) -> Result:
    """Train the step, and those on the way to it. Raises ConfigError and StoreError before anything is trained, or
    where a step on the way cannot be rebuilt.
    """
    values = of.recorded(request.run, request.policy)
    run = folder_of(request.run, request.policy, settings_in(request.run))[0]
    own = of.settings_of(values, request.run)
    other = of.changed(values, request.changes) if request.changes else None
    start, records = chain(run, request.step)
    model = of.model_folder(request.run, own, request.model, run.policy)
    view = open_folder(request.store)
    batches = Batches(view, own, run.policy)
    asked = None if other is None else Batches(view, other, run.policy)(records[-1])

    from lightning_ray.replay.training import Alternative, train_again

    settings = _update_settings(own, model, request)
    alternative = None
    if other is not None and asked is not None:
        changed = _update_settings(other, model, request)
        if other.schedule_steps is None:  # the rate falls over the run's steps, not over as many as it would have had
            changed = changed.model_copy(update={"schedule_steps": settings.schedule_steps})
        alternative = Alternative(changed, asked)
    replayed = train_again(settings, start, records, batches, alternative, request.threads)
    same_order = own.ranks == 1 and own.engine.device == settings.device == "cpu"
    tolerance = request.tolerance
    if tolerance is None:
        tolerance = tolerance_for(same_order, settings.dtype)
    apart = {record.step: differing(record.figures, replayed.steps[record.step], tolerance) for record in records}
    return Result(
        request,
        start,
        own.ranks,
        tolerance,
        compare(records[-1].figures, replayed.steps[request.step], replayed.changed),
        {step: names for step, names in apart.items() if names},
        batches.recounted,
    )


def _update_settings(algorithm: GRPO, model: Path, request: Request) -> UpdateSettings:
    chosen = algorithm.update_settings(model)
    return chosen if request.device is None else chosen.model_copy(update={"device": request.device})
