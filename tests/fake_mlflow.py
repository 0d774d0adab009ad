"""A stand-in for the package ``mlflow``, to be found under that name: what a tracker calls of it, kept in memory.

Signatures and refusals are MLflow's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

SOURCE = "from tests.fake_mlflow import MlflowClient, entities\n"


class MlflowException(Exception):
    """As MLflow's."""


@dataclass(frozen=True)
class Metric:
    """A point of a curve."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True)
class Param:
    """A setting."""

    key: str
    value: str


class entities:
    """The module of that name."""

    Metric = Metric
    Param = Param


@dataclass
class Info:
    """Of a run."""

    run_id: str
    status: str = "RUNNING"


@dataclass
class Run:
    """What was logged."""

    info: Info
    experiment_id: str
    name: str | None
    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)


@dataclass
class Experiment:
    """A name and an id."""

    name: str
    experiment_id: str


class MlflowClient:
    """All clients see the same server."""

    experiments: ClassVar[dict[str, Experiment]] = {}
    runs: ClassVar[dict[str, Run]] = {}

    def get_experiment_by_name(self, name: str) -> Experiment | None:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = Experiment(name, str(len(self.experiments)))
        return self.experiments[name].experiment_id

    def create_run(self, experiment_id: str, run_name: str | None = None) -> Run:
        run = Run(Info(f"run-{len(self.runs)}"), experiment_id, run_name)
        self.runs[run.info.run_id] = run
        return run

    def get_run(self, run_id: str) -> Run:
        return self.runs[run_id]

    def update_run(self, run_id: str, status: str | None = None) -> None:
        self.runs[run_id].info.status = str(status)

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        self.runs[run_id].info.status = status or "FINISHED"

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        if len(metrics) > 1000 or len(params) > 100:
            raise MlflowException(f"{len(metrics)} metrics and {len(params)} params at once")
        for each in (*metrics, *params):
            if not re.fullmatch(r"[/\w.\- :]*", each.key, re.ASCII):
                raise MlflowException(f"Invalid name: {each.key!r}")
        self.runs[run_id].metrics += metrics
        self.runs[run_id].params.update({param.key: param.value for param in params})

    def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
        return [metric for metric in self.runs[run_id].metrics if metric.key == key]
