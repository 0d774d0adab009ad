"""What is evaluated: a run's checkpoint, a folder with a model, an endpoint, or what the trainer has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from lightning_ray.errors import ConfigError
from lightning_ray.mirror import is_url, place_of
from lightning_ray.mirror.pull import everything, fetched
from lightning_ray.policy.model_folder import ADAPTER_CONFIG, check_model_folder
from lightning_ray.relay.settings import Upstream
from lightning_ray.run.folder import RunFolder, settings_in, step_of
from lightning_ray.run.state import ONLY, RunState
from lightning_ray.types import LLM

if TYPE_CHECKING:
    from lightning_ray.trainer import Trainer

Of = str | Path | Upstream | None
"""How a subject is named; see ``subject_of``."""
LATEST, BEST, INITIAL = "latest", "best", "initial"


Model = Path | Callable[[Path], None]
"""A folder, or what makes one in the folder that it is given."""


@dataclass(frozen=True)
class Subject:
    """``models`` by policy (the only one of a run is ``ONLY``), or an ``upstream``; or neither, for an agent that calls
    no model of ours.
    """

    title: str
    models: Mapping[str, Model] = field(default_factory=dict)
    upstream: Upstream | None = None
    versions: Mapping[str, int] = field(default_factory=dict)
    """The weights' numbers in their run, by policy; 0 if not told."""

    @property
    def alone(self) -> bool:
        """Whether there is one model, which goes by no name."""
        return list(self.models) == [ONLY]

    def version(self, policy: str = ONLY) -> int:
        """Of a policy's weights."""
        return self.versions.get(policy, 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without a key."""
        told: dict[str, Any] = {"title": self.title}
        models = {name: str(made) if isinstance(made, Path) else "made" for name, made in self.models.items()}
        versions = {name: self.version(name) for name in self.models}
        if self.alone:
            told |= {"model": models[ONLY], "weight_version": versions[ONLY]}
        elif models:
            told |= {"models": models, "weight_versions": versions}
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
    if RunFolder(fetched(trainer.folder, everything, needed=False)).latest_checkpoint() is not None:
        return checkpoint(trainer.folder, LATEST)
    if models := initial_models(trainer):
        return Subject("the initial model" if ONLY in models else "the initial models", models)
    for name, resource in (trainer.initial_resources or {}).items():
        if isinstance(resource, LLM):
            key = resource.api_key
            upstream = Upstream(
                base_url=resource.endpoint, model=resource.model, api_key=SecretStr(key) if key else None
            )
            return Subject(f"{name}: {resource.model} at {resource.endpoint}", upstream=upstream)
    return Subject("the agent alone")


def initial_models(trainer: Trainer) -> dict[str, Model]:
    """Of the trainer's algorithm, by policy. Raises ConfigError for a folder that has no model."""
    from lightning_ray.algorithms.weights import WeightAlgorithm

    algorithm = trainer.algorithm
    if not isinstance(algorithm, WeightAlgorithm):
        return {}
    found: dict[str, Model] = {}
    for name, own in {**algorithm.trained(), **algorithm.frozen()}.items():
        if own.model is not None:
            found[name] = own.model if callable(own.model) else check_model_folder(str(own.model), "algorithm.model")
    return found


def endpoint(upstream: Upstream) -> Subject:
    """An endpoint. Raises ConfigError if it names no model, or its key is not there."""
    if upstream.model is None:
        raise ConfigError(f"the endpoint {upstream.base_url} is to be evaluated with a model: give Upstream(model=...)")
    upstream.own_headers()
    return Subject(f"{upstream.model} at {upstream.base_url}", upstream=upstream)


def _folder(text: str) -> Subject:
    if is_url(text):
        url, at, which = text.rpartition("@") if "/" not in text.rpartition("@")[2] else (text, "", "")
        text = f"{fetched(place_of(url), everything)}{at}{which}"
    name, at, which = text.rpartition("@") if not Path(text).is_dir() else (text, "", "")
    folder = Path(name if at else text)
    if (folder / "checkpoints").is_dir():
        return checkpoint(folder, which or LATEST)
    if at or not folder.is_dir():
        raise ConfigError(
            f"{text!r} is no folder of a run and no folder of a model; give one, as runs/sql, runs/sql@best, "
            "runs/sql/checkpoints/step-000030, or an lr.Upstream for an endpoint"
        )
    return _checkpointed(str(folder), folder)


def _checkpointed(title: str, folder: Path) -> Subject:
    """A model's folder, or one with a folder for each of several policies. LoRA adapters are merged where they are
    served.
    """
    parts = {part.name: part for part in sorted(folder.iterdir()) if _holds_model(part)}
    models = {ONLY: folder} if _holds_model(folder) or not parts else parts
    for model in models.values():
        if not (model / ADAPTER_CONFIG).is_file():
            check_model_folder(str(model), "the model to evaluate")
    state = _read(folder / "run_state.json")
    policies = RunState.of(state).policies if state else {}
    versions = {name: known.version for name, known in policies.items()}
    return Subject(title, {name: model.absolute() for name, model in models.items()}, versions=versions)


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def checkpoint(run: Path, which: str) -> Subject:
    """A checkpoint of a run: ``latest``, ``best``, ``initial`` or a step. Raises ConfigError naming those it has."""
    folder = RunFolder(run)
    kept = folder.kept()
    if which == INITIAL:
        return _initial(run)
    latest = folder.latest_checkpoint()
    if latest is None:
        raise ConfigError(f"{run} has no finished checkpoint; give {run}@{INITIAL} for the model it began with")
    if which == LATEST:
        chosen = latest
    elif which == BEST:
        if (best := folder.best(kept)) is None:
            raise ConfigError(
                f"{run}@{BEST}: none of its checkpoints ({', '.join(map(str, kept))}) was validated; train with a "
                "val_dataset and validate_every, or name a step"
            )
        chosen = kept[best]
    elif which.isdigit() and int(which) in kept:
        chosen = kept[int(which)]
    else:
        raise ConfigError(
            f"{run}@{which}: there is no such checkpoint; there are {LATEST}, {BEST}, {INITIAL}, "
            f"{', '.join(map(str, kept))}"
        )
    return _checkpointed(f"{run}, step {step_of(chosen.name)}", chosen)


def _initial(run: Path) -> Subject:
    """The model that a run began with."""
    folder = RunFolder(run)
    settings = settings_in(run)
    named = settings.get("policies") or {ONLY: settings}
    found: dict[str, Model] = {}
    for name, values in named.items():
        if "model" in values:
            made = [path for path in (folder.model_of(name), Path(str(values["model"]))) if path.is_dir()]
            if not made:
                raise ConfigError(f"{run}@{INITIAL}: the model that it began with ({values['model']!r}) is not there")
            found[name] = check_model_folder(str(made[0]), f"{run}@{INITIAL}").absolute()
    if not found:
        raise ConfigError(f"{run}@{INITIAL}: its config.json names no model that it began with")
    return Subject(f"{run}, as it began", found)


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return values
