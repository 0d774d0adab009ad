"""What ``lightning-ray eval`` asks of the script that it runs: its ``Trainer.fit`` evaluates instead of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import ConfigError
from lightning_ray.stopping import run_interruptibly
from lightning_ray.types import Dataset

if TYPE_CHECKING:
    from lightning_ray.agent import LitAgent
    from lightning_ray.evaluation.plays import Tags
    from lightning_ray.evaluation.report import EvaluationReport
    from lightning_ray.evaluation.settings import EvaluationSettings
    from lightning_ray.evaluation.subject import Of
    from lightning_ray.trainer import Trainer

SPLITS = ("val", "test", "train")
SUFFIX = "-eval"


class Evaluated(BaseException):
    """Ends the script whose ``fit`` has evaluated: what follows is about a training that was not."""


@dataclass
class EvaluationRequest:
    """See the module. ``of`` are one or two subjects; the reports of those that were played are left here."""

    of: Sequence[Of]
    settings: EvaluationSettings
    split: str | None = None
    tasks: int | None = None
    """The first so many; all without it."""
    name: str | None = None
    reports: list[EvaluationReport] = field(default_factory=list)

    def answer(self, trainer: Trainer, agent: LitAgent[Any], datasets: Mapping[str, Dataset[Any]]) -> None:
        """Evaluate each subject on the same tasks. Raises ConfigError for a data set that the script does not have."""
        split = self._split(datasets)
        tasks = datasets[split]
        if self.tasks is not None:
            from lightning_ray.dev import FirstOf

            tasks = FirstOf(tasks, self.tasks)
        for number, of in enumerate(self.of):
            name = f"{self.name or trainer.folder.name + SUFFIX}{'-against' * number}"
            data = f"{len(tasks)} tasks of {split}"
            self.reports.append(evaluate_subject(trainer, agent, tasks, of, self.settings, name, data))

    def _split(self, datasets: Mapping[str, Dataset[Any]]) -> str:
        given = [split for split in SPLITS if len(datasets.get(split, ()))]
        if self.split is not None and self.split not in given:
            raise ConfigError(f"--split {self.split}: the script gives fit() no such data set; it gives {given}")
        if not given:
            raise ConfigError("the script gives fit() no tasks to evaluate on: no val, test or train data set")
        return self.split or given[0]


def evaluate_subject(
    trainer: Trainer,
    agent: LitAgent[Any],
    tasks: Dataset[Any],
    of: Of,
    settings: EvaluationSettings,
    name: str | None = None,
    data: str | None = None,
    tags: Tags | None = None,
) -> EvaluationReport:
    """One evaluation, in ``runs_dir/name``; see ``Trainer.validate``."""
    from lightning_ray.evaluation.session import EvaluationSession
    from lightning_ray.evaluation.subject import subject_of
    from lightning_ray.run.folder import RunFolder

    subject = subject_of(of, trainer)
    folder = RunFolder(Path(trainer.folder).parent / (name or trainer.folder.name + SUFFIX))
    session = EvaluationSession(trainer, agent, subject, settings)
    return run_interruptibly(session.run(tasks, data or f"{len(tasks)} tasks", folder, tags))
