"""What is evaluated: a run's checkpoint, a folder with a model, an endpoint, or what the trainer has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import check_model_folder
from lightning_ray.relay.settings import Upstream
from lightning_ray.run_folder import RunFolder
from lightning_ray.run_state import RunState
from lightning_ray.types import LLM

if TYPE_CHECKING:
    from lightning_ray.trainer import Trainer

Of = str | Path | Upstream | None
"""How a subject is named; see ``subject_of``."""
LATEST, BEST, INITIAL = "latest", "best", "initial"


@dataclass(frozen=True)
class Subject:
    """One of ``model`` (a folder, or what makes one in the folder that it is given) and ``upstream``; or neither, for
    an agent that calls no model of ours.
    """

    title: str
    model: Path | Callable[[Path], None] | None = None
    upstream: Upstream | None = None
    version: int = 0
    """The weights' number in their run."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without a key."""
        told: dict[str, Any] = {"title": self.title}
        if self.model is not None:
            told |= {"model": str(self.model) if isinstance(self.model, Path) else "made on the spot"}
            told |= {"weight_version": self.version}
        if self.upstream is not None:
            told |= {"endpoint": self.upstream.base_url, "model": self.upstream.model}
        return told


def subject_of(of: Of, trainer: Trainer) -> Subject:
    """What ``of`` means.

    A folder is a run's (its latest checkpoint; ``runs/sql@best``, ``runs/sql@initial`` and ``runs/sql@30`` name
    others) or a model's, an Upstream is an endpoint. None is what the trainer has: the latest checkpoint of its run,
    otherwise its algorithm's model, otherwise the LLM among its initial resources. Raises ConfigError.
    """
    if isinstance(of, Upstream):
        return endpoint(of)
    if of is not None:
        return _folder(str(of))
    if RunFolder(trainer.folder).latest_checkpoint() is not None:
        return checkpoint(trainer.folder, LATEST)
    model = getattr(trainer.algorithm, "model", None)
    if callable(model):
        return Subject("the initial model", model)
    if model is not None:
        return Subject(f"the initial model {model}", check_model_folder(str(model), "algorithm.model"))
    for name, resource in (trainer.initial_resources or {}).items():
        if isinstance(resource, LLM):
            key = resource.api_key
            upstream = Upstream(
                base_url=resource.endpoint, model=resource.model, api_key=SecretStr(key) if key else None
            )
            return Subject(f"{name}: {resource.model} at {resource.endpoint}", upstream=upstream)
    return Subject("the agent alone")


def endpoint(upstream: Upstream) -> Subject:
    """An endpoint. Raises ConfigError if it names no model, or its key is not there."""
    if upstream.model is None:
        raise ConfigError(f"the endpoint {upstream.base_url} is to be evaluated with a model: give Upstream(model=...)")
    upstream.own_headers()
    return Subject(f"{upstream.model} at {upstream.base_url}", upstream=upstream)


def _folder(text: str) -> Subject:
    name, at, which = text.rpartition("@") if not Path(text).is_dir() else (text, "", "")
    folder = Path(name if at else text)
    if (folder / "checkpoints").is_dir():
        return checkpoint(folder, which or LATEST)
    if at or not folder.is_dir():
        raise ConfigError(
            f"{text!r} is no folder of a run and no folder of a model; give one, as runs/sql, runs/sql@best, "
            "runs/sql/checkpoints/step-000030, or an lr.Upstream for an endpoint"
        )
    check_model_folder(str(folder), "the model to evaluate")
    return Subject(str(folder), folder.absolute(), version=_version(folder))


def checkpoint(run: Path, which: str) -> Subject:
    """A checkpoint of a run: ``latest``, ``best``, ``initial`` or a step. Raises ConfigError naming those it has."""
    folder = RunFolder(run)
    kept = {int(path.name.removeprefix("step-")): path for path in sorted(folder.checkpoints.glob("step-*"))}
    if which == INITIAL:
        return _initial(run)
    latest = folder.latest_checkpoint()
    if latest is None:
        raise ConfigError(f"{run} has no finished checkpoint; give {run}@{INITIAL} for the model it began with")
    if which == LATEST:
        chosen = latest
    elif which == BEST:
        chosen = kept[_best(folder, kept)]
    elif which.isdigit() and int(which) in kept:
        chosen = kept[int(which)]
    else:
        raise ConfigError(
            f"{run}@{which}: there is no such checkpoint; there are {LATEST}, {BEST}, {INITIAL}, "
            f"{', '.join(map(str, kept))}"
        )
    check_model_folder(str(chosen), f"{run}@{which}")
    return Subject(f"{run}, step {int(chosen.name.removeprefix('step-'))}", chosen.absolute(), version=_version(chosen))


def _initial(run: Path) -> Subject:
    """The model that a run began with."""
    model = run / "model"
    if not model.is_dir():
        named = (_read(run / "config.json").get("algorithm") or {}).get("model")
        if not isinstance(named, str) or not Path(named).is_dir():
            raise ConfigError(f"{run}@{INITIAL}: the model that it began with ({named!r}) is not there")
        model = Path(named)
    return Subject(f"{run}, initial model", check_model_folder(str(model), f"{run}@{INITIAL}").absolute())


def _best(folder: RunFolder, kept: Mapping[int, Path]) -> int:
    """The step of the kept checkpoint with the highest greedy validation reward; the latest of equals."""
    rows = [row for row in folder.metrics() if row.get("kind") == "val" and row.get("mode") == "greedy"]
    rewards = {row["step"]: row["reward"] for row in rows if row["step"] in kept and row["reward"] is not None}
    if not rewards:
        raise ConfigError(
            f"{folder.path}@{BEST}: none of its checkpoints ({', '.join(map(str, kept))}) was validated; train with a "
            "val_dataset and validate_every, or name a step"
        )
    return max(rewards, key=lambda step: (rewards[step], step))


def _version(folder: Path) -> int:
    state = _read(folder / "run_state.json")
    return RunState.of(state).version if state else 0


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return values
