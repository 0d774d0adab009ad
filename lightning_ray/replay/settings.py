"""The settings of a run as its folder keeps them, and others in their place."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.own import OWN
from lightning_ray.algorithms.presets import PRESETS, take_out
from lightning_ray.config import build
from lightning_ray.errors import ConfigError
from lightning_ray.launch import parse_setting, put
from lightning_ray.policy.settings import LearningSettings
from lightning_ray.run.folder import RunFolder, settings_in
from lightning_ray.run.policy_folder import folder_of
from lightning_ray.run.state import ONLY

CHANGEABLE = sorted({*LearningSettings.model_fields, "preset", "batch", "agent_match", "max_staleness"} - {"lora"})
"""Settings of an algorithm that matter between a step's rollouts and its new weights."""


def recorded(run: Path, policy: str | None = None) -> dict[str, Any]:
    """The algorithm's settings in config.json, of one of several policies, as plain values. Raises ConfigError if there
    are none.
    """
    file = run / "config.json"
    if not file.is_file():
        raise ConfigError(f"{run} has no config.json: give the folder of a run, which has its settings")
    values = folder_of(run, policy, settings_in(run))[1]
    if not isinstance(values, dict) or "model" not in values:
        raise ConfigError(f"{file}: its algorithm does not train weights; there is no step to replay")
    if values.get("base") == OWN:
        # Its update is GRPO's, on advantages that its steps recorded; what else it has is its own business.
        known = {name: value for name, value in values.items() if name in GRPO.model_fields}
        return {**known, "group_size": max(2, known["group_size"])}
    if foreign := sorted(values.keys() - GRPO.model_fields.keys() - {"name"}):
        raise ConfigError(
            f"{file}: its algorithm is {values.get('name')}, which has {', '.join(foreign)}; a replay trains steps of "
            "GRPO and of algorithms of one's own"
        )
    return {name: value for name, value in values.items() if name != "name"}


def settings_of(values: Mapping[str, Any], run: Path) -> GRPO:
    """The algorithm of plain values."""
    return build(GRPO, dict(values), f"{run / 'config.json'}: algorithm")


def changed(values: Mapping[str, Any], given: Sequence[str]) -> GRPO:
    """The algorithm with other settings, given as ``algorithm.NAME=VALUE``. Raises ConfigError for those that a replay
    cannot follow.

    A preset takes the place of all that papers decide, save for what is given beside it.
    """
    others = dict(parse_setting(text) for text in given)
    result = json.loads(json.dumps(dict(values)))
    for key in others:
        _check(key, others[key])
    if "algorithm.preset" in others:
        for preset in PRESETS.values():
            take_out(result, preset)
    for key, value in others.items():
        put(result, key.split(".")[1:], value)
    return build(GRPO, result, "algorithm")


def _check(key: str, value: Any) -> None:
    head, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if head == "algorithm" and name in CHANGEABLE:
        return
    if head == "algorithm" and name in GRPO.model_fields:
        raise ConfigError(
            f"--set {key}={value!r}: a replay cannot change it: what was played is played, and the weights are the "
            f"run's; it can change {', '.join(CHANGEABLE)}"
        )
    close = difflib.get_close_matches(key.removeprefix("algorithm."), CHANGEABLE, n=1)
    hint = f"did you mean 'algorithm.{close[0]}'?" if close else f"known: algorithm. and {', '.join(CHANGEABLE)}"
    raise ConfigError(f"--set {key}={value!r}: there is no such setting; {hint}")


def model_folder(run: Path, settings: GRPO, given: Path | None = None, policy: str | None = None) -> Path:
    """The initial model: as given, the one that the run made in its folder, or the one that its settings name.

    Raises ConfigError if there is none.
    """
    made = RunFolder(run).model_of(policy or ONLY)
    folder = given or (made if made.is_dir() else Path(str(settings.model)))
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"the run's initial model is not in {str(folder)!r}: say where it is now, with --model FOLDER"
        )
    return folder
