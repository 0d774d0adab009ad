"""GRPO: groups of rollouts of one task, advantages relative to the group, a clipped policy update, a proved swap.

Group Relative Policy Optimization (Shao et al., 2024, "DeepSeekMath"), with DAPO's asymmetric clip (Yu et al., 2025).
Advantage and loss are verl's; the loop is ``algorithms.loop``'s; these are its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lightning_ray.algorithms.presets import PresetName, with_preset
from lightning_ray.algorithms.weights import WeightAlgorithm, check_tasks
from lightning_ray.policy.settings import LearningSettings

if TYPE_CHECKING:
    from lightning_ray.algorithms.source import Source
    from lightning_ray.phases import PhaseClock
    from lightning_ray.run import Run
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
    """Settings of a GRPO run. One step plays ``prompts_per_step`` tasks ``group_size`` times each."""

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
