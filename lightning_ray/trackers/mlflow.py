"""MLflow, set up by its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...).

Parameters are the run's resolved settings by dotted name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_ray.trackers.base import Row, remembered, scalars, settings_of

EXPERIMENT = "lightning-ray"
"""Where MLFLOW_EXPERIMENT_NAME does not say otherwise."""
BATCH = 100
"""Parameters that MLflow takes at once."""
LONGEST = 500
"""Characters of a parameter."""
_ILLEGAL = re.compile(r"[^\w\-. :/]", re.ASCII)


class MlflowTracker:
    """One run in MLflow, which a resume continues."""

    def __init__(self, folder: Path):
        import mlflow

        self._client = mlflow.MlflowClient()
        self._entities = mlflow.entities
        known = remembered(folder, "mlflow")
        if known.is_file():
            self._run_id = known.read_text().strip()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run_id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
        known.write_text(self._run_id)
        self._log_settings(folder)

    def _log_settings(self, folder: Path) -> None:
        param = self._entities.Param
        found = [param(legal(name), str(value)[:LONGEST]) for name, value in dotted(settings_of(folder))]
        for start in range(0, len(found), BATCH):
            self._client.log_batch(self._run_id, params=found[start : start + BATCH])

    def log(self, row: Row) -> None:
        """Send the row's numbers."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(legal(name), v, now, row["step"]) for name, v in scalars(row).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Tell that the run has ended."""
        self._client.set_terminated(self._run_id)


def legal(name: str) -> str:
    """The name without what MLflow refuses in one."""
    return _ILLEGAL.sub("_", name)


def dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, those of parts one by one."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
