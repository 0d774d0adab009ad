"""A run's folder as one of several policies has it: its own rows, steps, model, and part of the checkpoints."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.policy_rows import rows_of


class PolicyFolder(RunFolder):
    """To read; a run writes by ``RunFolder``."""

    def __init__(self, path: Path, policy: str):
        super().__init__(path)
        self.policy = self._name = policy

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl as if the policy were alone."""
        return rows_of(super().metrics(), self._name)

    def steps(self) -> dict[int, dict[str, Any]]:
        """The lines of steps.jsonl as if the policy were alone."""
        own = {"versions": "version", "trained": "trained"}
        return {
            step: {**line, **{name: line[by_policy][self._name] for by_policy, name in own.items()}}
            for step, line in super().steps().items()
        }

    def part(self, checkpoint: Path) -> Path:
        """The policy's."""
        return checkpoint / self._name

    def model(self) -> Path:
        """Of the policy."""
        return self.model_of(self._name)


def folder_of(run: Path, policy: str | None, settings: Mapping[str, Any]) -> tuple[RunFolder, dict[str, Any]]:
    """The folder and the settings as the policy has them; of several the first that is trained, unless one is named.

    Raises ConfigError for a policy that the run did not train.
    """
    policies = settings.get("policies")
    if not policies:
        if policy is not None:
            raise ConfigError(f"--policy {policy}: {run} has one policy, which has no name; leave it out")
        return RunFolder(run), dict(settings)
    trained = [name for name, own in policies.items() if own["trainable"]]
    chosen = trained[0] if policy is None else policy
    if chosen not in trained:
        close = difflib.get_close_matches(chosen, trained, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"{run} trains {', '.join(trained)}"
        what = "is not trained" if chosen in policies else "there is no such policy"
        raise ConfigError(f"--policy {chosen}: {what}; {hint}")
    own = {name: value for name, value in policies[chosen].items() if name not in ("trainable", "agents")}
    return PolicyFolder(run, chosen), {"name": settings.get("name"), **own}
