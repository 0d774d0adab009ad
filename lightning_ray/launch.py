"""How a script was launched: the name, the settings and the resume that the command line gives to its Trainer.

``lightning-ray train`` runs the user's script as it is; the Trainer in it asks here what was overridden.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from lightning_ray.algorithms.base import Algorithm, AlgorithmSettings
from lightning_ray.config import build
from lightning_ray.errors import ConfigError
from lightning_ray.placement.settings import Placement
from lightning_ray.relay.settings import Upstream

if TYPE_CHECKING:
    from lightning_ray.evaluation.request import EvaluationRequest

A = TypeVar("A", bound=Algorithm | None)
N = TypeVar("N")
SETTINGS = ("n_runners", "max_runners", "concurrency", "trackers")
"""Of the Trainer itself."""
OTHERS = "placement.<role>.<setting>, relays.<name>.<setting>"


@dataclass
class Launch:
    """What the command line asked for. ``settings`` maps dotted keys (``algorithm.steps``) to values."""

    name: str | None = None
    runs_dir: str | Path | None = None
    """A folder, or a URL as ``s3://bucket/runs``."""
    resume: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationRequest | None = None
    """With it, ``fit`` evaluates instead of training."""
    _used: set[str] = field(default_factory=set)

    def apply(self, algorithm: A) -> A:
        """The algorithm with its overridden settings. Raises ConfigError for unknown keys and bad values."""
        if not isinstance(algorithm, AlgorithmSettings):
            return algorithm
        values = algorithm.given()
        for key, value in self.settings.items():
            head, _, rest = key.partition(".")
            if head == "algorithm" and rest:
                self._used.add(key)
                put(values, rest.split("."), value)
        return build(type(algorithm), values, "algorithm") if self._used else algorithm

    def upstreams(self, given: Mapping[str, Upstream]) -> dict[str, Upstream]:
        """The relays' upstreams with their overridden settings (``relays.NAME.model``). Raises ConfigError."""
        values: dict[str, Any] = {name: dict(upstream) for name, upstream in given.items()}
        for key, value in self.settings.items():
            head, _, rest = key.partition(".")
            name, _, field_name = rest.rpartition(".")
            if head == "relays" and name in values:
                self._used.add(key)
                values[name][field_name] = value
        return {name: build(Upstream, value, f"relays.{name}") for name, value in values.items()}

    def placement(self, given: Placement | Mapping[str, Any] | None) -> Placement:
        """Where parts go, with its overridden settings (``placement.trainer.label``). Raises ConfigError."""
        values = given.model_dump(exclude_unset=True) if isinstance(given, Placement) else dict(given or {})
        for key, value in self.settings.items():
            head, _, rest = key.partition(".")
            if head == "placement" and rest:
                self._used.add(key)
                put(values, rest.split("."), value, head)
        return build(Placement, values, "placement")

    def setting(self, key: str, default: int) -> int:
        """An overridden whole number of the Trainer."""
        if key not in self.settings:
            return default
        self._used.add(key)
        value = self.settings[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{key}={value!r}: give a whole number of at least 1")
        return value

    def names(self, key: str, default: Sequence[N]) -> Sequence[N | str]:
        """An overridden list of names of the Trainer: JSON, or separated by commas."""
        if key not in self.settings:
            return default
        self._used.add(key)
        value = self.settings[key]
        if isinstance(value, str):
            return [name.strip() for name in value.split(",") if name.strip()]
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{key}={value!r}: give names separated by commas, or a JSON list of them")
        return value

    def refuse_leftovers(self) -> None:
        """Raises ConfigError for a key that nothing used."""
        for key in self.settings.keys() - self._used:
            close = difflib.get_close_matches(key, SETTINGS, n=1)
            known = f"known: {', '.join(SETTINGS)}, algorithm.<setting>, {OTHERS}"
            hint = f"did you mean {close[0]!r}?" if close else known
            raise ConfigError(f"{key}={self.settings[key]!r}: there is no such setting; {hint}")


def put(values: dict[str, Any], path: list[str], value: Any, where: str = "algorithm") -> None:
    """Set a nested value; settings on the way become plain dicts."""
    for part in path[:-1]:
        inner = values.get(part, {})
        if not isinstance(inner, (dict, BaseModel)):
            raise ConfigError(
                f"{where}.{'.'.join(path)}={value!r}: {part!r} is a {type(inner).__name__} and has no settings"
            )
        values[part] = dict(inner) if isinstance(inner, dict) else inner.model_dump(exclude_unset=True)
        values = values[part]
    values[path[-1]] = value


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value``, the value as JSON if it is JSON and as text otherwise. Raises ConfigError without a ``=``."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write key=value, for instance --set algorithm.steps=5")
    try:
        return key, json.loads(raw)
    except ValueError:
        return key, raw


_launch: ContextVar[Launch | None] = ContextVar("lightning_ray_launch", default=None)


def current_launch() -> Launch:
    """How this script was launched; nothing overridden in a plain script."""
    return _launch.get() or Launch()


@contextmanager
def launched(launch: Launch) -> Iterator[None]:
    """Trainers made in this context follow ``launch``."""
    token = _launch.set(launch)
    try:
        yield
    finally:
        _launch.reset(token)
