"""GRPO: groups of rollouts of one task, advantages relative to the group, a clipped policy update, a proved swap.

Group Relative Policy Optimization (Shao et al., 2024, "DeepSeekMath"), with DAPO's asymmetric clip (Yu et al., 2025).
Advantage and loss are verl's; the loop is ``algorithms.loop``'s; these are its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lightning_ray.algorithms.policies import Policy, check_policies, policies_of, settings_of
from lightning_ray.algorithms.presets import PresetName, with_preset
from lightning_ray.algorithms.weights import WeightAlgorithm, check_tasks
from lightning_ray.errors import ConfigError
from lightning_ray.policy.settings import LearningSettings
from lightning_ray.relay.settings import Upstream

if TYPE_CHECKING:
    from lightning_ray.algorithms.source import Source
    from lightning_ray.run.phases import PhaseClock
    from lightning_ray.run.run import Run
    from lightning_ray.trajectories.account import Account
    from lightning_ray.trajectories.episode import Episode

NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling from the policy itself: the trainer's logprobs are of exactly this distribution."""


class GRPO(WeightAlgorithm, LearningSettings):
    """Settings of a GRPO run. One step plays ``prompts_per_step`` tasks ``group_size`` times each; of several policies
    each is trained on its own calls in them.
    """

    policies: dict[str, Policy] | None = None
    """Several policies by name, in place of ``model``; all else here is theirs where they do not say otherwise."""

    preset: PresetName | None = None
    """Defaults of a paper (``algorithms.presets``) for what is not given."""

    group_size: int = Field(default=8, ge=2)
    prompts_per_step: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-6, gt=0)
    max_resamples: int = Field(default=3, ge=0)
    """How often in a step groups are played again that ``batch`` says to resample."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        return with_preset(given, cls.model_fields) if isinstance(given, dict) else given

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("policies") is None:
            return given
        if cls is not GRPO:
            raise ConfigError(f"algorithm.policies: {cls.__name__} trains one policy; several are lr.GRPO's")
        for name in ("model", "model_name", "agent_match"):
            if given.get(name) is not None:
                raise ConfigError(
                    f"algorithm.{name}={given[name]!r:.80} and algorithm.policies are both given: with policies, each "
                    "has a model (and agents) of its own"
                )
        return {**given, "model": None, "policies": policies_of(given["policies"])}

    @model_validator(mode="after")
    def _policies_fit(self) -> GRPO:
        if self.policies is not None:
            check_policies(self.policies)
        return self

    def of(self, name: str) -> GRPO:
        """The settings of one of the policies, as if it were alone. Raises ConfigError if they do not fit together."""
        values = settings_of(name, self.policies or {}, self.given())
        try:
            return GRPO(**values)
        except ConfigError as error:
            raise ConfigError(f"policies.{name}: {error}") from None

    def trained(self) -> dict[str, WeightAlgorithm]:
        """See ``WeightAlgorithm``."""
        if self.policies is None:
            return super().trained()
        return {name: self.of(name) for name, policy in self.policies.items() if policy.trainable}

    def frozen(self) -> dict[str, WeightAlgorithm]:
        """See ``WeightAlgorithm``."""
        policies = (self.policies or {}).items()
        return {name: self.of(name) for name, policy in policies if not policy.trainable and policy.model is not None}

    def relays(self, given: Mapping[str, Upstream]) -> dict[str, Upstream]:
        """With the policies that are served elsewhere."""
        policies = self.policies or {}
        if both := sorted(policies.keys() & given.keys()):
            raise ConfigError(f"{', '.join(both)}: relays and policies both have this name; give one of them another")
        own = {name: policy.upstream for name, policy in policies.items() if policy.upstream is not None}
        return {**given, **own}

    def settings(self) -> dict[str, Any]:
        """The fields, and of each policy that the run serves those that hold for it."""
        values = super().settings()
        for name, policy in (self.policies or {}).items():
            declared = {"trainable": policy.trainable, "agents": policy.agents}
            if policy.upstream is None:
                values["policies"][name] = {**declared, **self.of(name).settings()}
            else:
                values["policies"][name] = {**declared, "endpoint": policy.upstream.model_dump(mode="json")}
        return values

    def optimizer_steps(self) -> int | None:
        """As if every rollout were trained on."""
        minibatches = -(-self.prompts_per_step * self.group_size // self.minibatch_rollouts)
        return max(self.steps * self.epochs * minibatches, 1)

    def settle(self, episodes: Sequence[Episode], group_of: Mapping[str, str], oldest_version: int | None) -> Account:
        """Groups whose rewards differ, as ``batch`` has it."""
        from lightning_ray.trajectories.account import settle

        return settle(episodes, group_of, self.batch, oldest_version)

    def source(self, run: Run, clock: PhaseClock) -> Source:
        """The run's own policy, on its training tasks."""
        from lightning_ray.algorithms.playing import PlayedRollouts

        return PlayedRollouts(self, run, clock, self.prompts_per_step, self.max_resamples)

    def check(self, run: Run) -> None:
        """A task, the model, the engine's port and the memory must be there."""
        check_tasks(run)
        super().check(run)
