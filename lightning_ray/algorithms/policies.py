"""Several policies by declaration: where each is served, whether it is trained, by whose calls, and how.

What a policy does not say is the run's own, part by part; what a preset of its own decides is not. Invariant: a call
trains the policy whose endpoint it went to and no other, and that one only if the agent that made it is among its
``agents``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from lightning_ray.algorithms.presets import PRESETS, PresetName, over, take_out
from lightning_ray.config import EngineSettings, build, explain
from lightning_ray.errors import ConfigError
from lightning_ray.policy.settings import LearningSettings
from lightning_ray.relay.settings import Upstream, check_name
from lightning_ray.run.state import ONLY
from lightning_ray.trajectories.settings import BatchSettings

DECLARED = ("model", "endpoint", "trainable", "agents")
"""Fields of a policy that are no settings of an algorithm's."""


class Policy(LearningSettings):
    """One of several policies; ``model`` or ``endpoint`` says where it is. Bad settings raise ConfigError."""

    model: str | Path | Callable[[Path], None] | None = None
    """Folder with a Hugging Face model, or a function that makes one in the folder it is given: once, for all policies
    that name the same one."""
    endpoint: str | Upstream | None = None
    """Address of a model that is served elsewhere (an ``Upstream`` says more), reached through the relay."""
    trainable: bool = True
    """A policy that is not trained is served as it is."""
    agents: str | None = None
    """Regular expression: only calls of agents whose whole name it matches train the policy; all of its calls do
    without one."""
    preset: PresetName | None = None
    ranks: int = Field(default=2, ge=1)
    batch: BatchSettings = BatchSettings()
    max_staleness: int = Field(default=0, ge=0)
    engine: EngineSettings = EngineSettings()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), "policy")) from None

    @model_validator(mode="after")
    def _horizon_where_needed(self) -> Policy:
        return self  # whether settings fit together shows when the run's are beneath them

    @model_validator(mode="after")
    def _weights_count_once(self) -> Policy:
        return self

    @property
    def upstream(self) -> Upstream | None:
        """What the relay is to know of its endpoint."""
        if isinstance(self.endpoint, str):
            return build(Upstream, {"base_url": self.endpoint}, "endpoint")
        return self.endpoint

    def given(self) -> dict[str, Any]:
        """What was given, as plain values."""
        return {name: plain(getattr(self, name)) for name in self.model_fields_set}


def policies_of(given: Any) -> dict[str, Policy]:
    """The policies of a mapping whose values may be plain. Raises ConfigError."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"algorithm.policies={given!r:.80}: give a mapping from names to lr.Policy(...)")
    return {str(name): _policy(str(name), value) for name, value in given.items()}


def _policy(name: str, value: Any) -> Policy:
    if isinstance(value, Policy):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"algorithm.policies.{name}={value!r:.80}: give an lr.Policy(model=...)")
    try:
        return Policy(**value)
    except ConfigError as error:
        raise ConfigError(str(error).replace("policy.", f"algorithm.policies.{name}.")) from None


def check_policies(policies: Mapping[str, Policy]) -> None:
    """Raises ConfigError for what cannot be served or trained, naming the policy and the fix."""
    for name, policy in policies.items():
        _check_place(name, policy, policies)
        if policy.agents is not None:
            try:
                re.compile(policy.agents)
            except re.error as error:
                raise ConfigError(
                    f"policies.{name}.agents={policy.agents!r} is no regular expression: {error}"
                ) from None
    for name in policies:
        check_name("policy", name)
        if name == ONLY:
            raise ConfigError(f"policy {name!r}: that is what a run's only policy is called; give it another name")
    if not any(policy.trainable for policy in policies.values()):
        names = ", ".join(policies) or "them"
        raise ConfigError(f"policies: none of {names} is trained; give one with a model, and not trainable=False")
    _check_overlap(policies)


def _check_place(name: str, policy: Policy, policies: Mapping[str, Policy]) -> None:
    if policy.model is None and policy.endpoint is None:
        close = difflib.get_close_matches(name, [other for other in policies if other != name], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"policies.{name}: there is neither model nor endpoint; give one of them{hint}")
    if policy.model is not None and policy.endpoint is not None:
        raise ConfigError(
            f"policies.{name}: model={policy.model!r} and endpoint={policy.endpoint!r} are both given; a policy is "
            "served by the run from its model, or elsewhere at its endpoint"
        )
    if policy.endpoint is not None and policy.trainable:
        raise ConfigError(
            f"policies.{name}.endpoint={policy.endpoint!r}: its weights are out of reach; set trainable=False, or give "
            "a model to train"
        )


def _check_overlap(policies: Mapping[str, Policy]) -> None:
    """No agent may be meant by two policies of one address."""
    known: dict[str, list[str]] = {}
    for name, policy in policies.items():
        address = name if policy.upstream is None else policy.upstream.base_url
        for other in known.setdefault(address, []):
            if (shared := shared_name(policies[other].agents, policy.agents)) is not None:
                raise ConfigError(
                    f"policies.{other}.agents={policies[other].agents!r} and policies.{name}.agents={policy.agents!r} "
                    f"have {shared} in common, and both have the endpoint {address!r}: let each agent call one of them"
                )
        known[address].append(name)


def shared_name(one: str | None, other: str | None) -> str | None:
    """A name that both expressions match, in words, as far as they spell names out or are the same."""
    if one is None or other is None:
        return "every agent" if one is other else f"agents like {(one or other)!r}"
    for pattern, against in ((one, other), (other, one)):
        for name in pattern.split("|"):
            if re.escape(name) == name.replace("-", r"\-") and re.fullmatch(against, name):
                return repr(name)
    return f"all of {one!r}" if one == other else None


def settings_of(name: str, policies: Mapping[str, Policy], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's settings as those of an algorithm of its own; ``shared`` are the run's, as they were given.

    Raises ConfigError for a policy that is not there.
    """
    if name not in policies:
        close = difflib.get_close_matches(name, list(policies), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(policies)}"
        raise ConfigError(f"there is no policy {name!r}; {hint}")
    policy = policies[name]
    own = {field: value for field, value in policy.given().items() if field not in DECLARED}
    values = {field: plain(value) for field, value in shared.items() if field != "policies"}
    if "preset" in own:
        for preset in PRESETS.values():
            take_out(values, preset)
    agents = None if policy.agents is None else rf"\A(?:{policy.agents})\Z"
    return {**over(values, own), "model": policy.model, "model_name": name, "agent_match": agents}


def plain(value: Any) -> Any:
    """Settings as the mapping of what was given of them."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
