"""Which trackers a run has beside those that are always there: by name, or objects of the user's own."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_ray.errors import ConfigError
from lightning_ray.trackers.base import Tracker

Choice = str | Tracker
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
"""Name of a tracker, and of the extra that installs what it needs -> the package, which its first row imports."""


def check_trackers(chosen: Sequence[Choice]) -> list[Choice]:
    """The choice, each once. Raises ConfigError for a name that is none, and for what is no tracker."""
    if isinstance(chosen, str):
        raise ConfigError(f"trackers={chosen!r}: give a list, [{chosen!r}]")
    for choice in chosen:
        if isinstance(choice, str):
            if choice not in PACKAGES:
                close = difflib.get_close_matches(choice, PACKAGES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(PACKAGES)}"
                raise ConfigError(f"trackers={list(chosen)!r}: there is no tracker {choice!r}; {hint}")
        elif isinstance(choice, type) or not isinstance(choice, Tracker):
            raise ConfigError(f"trackers: {choice!r:.60} is no tracker; give an object with log(row) and close()")
    return [choice for index, choice in enumerate(chosen) if choice not in chosen[:index]]


def check_installed(chosen: Sequence[Choice]) -> None:
    """Raises ConfigError if a package that a chosen tracker needs is not there."""
    for choice in chosen:
        if isinstance(choice, str) and importlib.util.find_spec(PACKAGES[choice]) is None:
            raise ConfigError(
                f"trackers: {choice!r} needs the package {PACKAGES[choice]!r}, which is not installed: "
                f"pip install 'lightning-ray[{choice}]', or leave it out"
            )


def name_of(choice: Choice) -> str:
    """What a person calls it."""
    return choice if isinstance(choice, str) else type(choice).__name__


def maker(choice: Choice, folder: Path) -> Callable[[], Tracker]:
    """What opens it for the run in ``folder``."""

    def make() -> Tracker:
        if choice == "wandb":
            from lightning_ray.trackers.wandb import WandbTracker

            return WandbTracker(folder)
        if choice == "mlflow":
            from lightning_ray.trackers.mlflow import MlflowTracker

            return MlflowTracker(folder)
        assert not isinstance(choice, str)
        return choice

    return make
