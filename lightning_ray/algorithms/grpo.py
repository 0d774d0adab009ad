"""GRPO: groups of rollouts of one task, advantages relative to the group, a clipped policy update, a proved swap.

Group Relative Policy Optimization (Shao et al., 2024, "DeepSeekMath"), with DAPO's asymmetric clip (Yu et al., 2025).
Advantage and loss are verl's; the loop is ``algorithms.loop``'s; these are its settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lightning_ray.algorithms.base import AlgorithmSettings
from lightning_ray.algorithms.presets import PresetName, with_preset
from lightning_ray.config import EngineSettings, build
from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import check_model_folder
from lightning_ray.policy.settings import LearningSettings, UpdateSettings
from lightning_ray.trajectories.settings import BatchSettings

if TYPE_CHECKING:
    from lightning_ray.run import Run

NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling from the policy itself: the trainer's logprobs are of exactly this distribution."""


def check_expression(name: str, value: str) -> None:
    """Raises ConfigError if it is no regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{name}={value!r} is no regular expression: {error}") from None


class GRPO(AlgorithmSettings, LearningSettings):
    """Settings of a GRPO run. One step plays ``prompts_per_step`` tasks ``group_size`` times each."""

    preset: PresetName | None = None
    """Defaults of a paper (``algorithms.presets``) for what is not given."""

    model: str | Path | Callable[[Path], None]
    """Folder with a Hugging Face model, or a function that makes one in the folder it is given."""
    model_name: str = "policy"
    """The model's name on the wire."""
    agent_match: str | None = None
    """Only calls of agents in whose name this regular expression is found are trained on; all without one."""
    group_size: int = Field(default=8, ge=2)
    prompts_per_step: int = Field(default=16, ge=1)
    steps: int = Field(default=30, ge=0)
    ranks: int = Field(default=2, ge=1)
    """Trainer ranks, sharded by FSDP2."""
    store_shards: int = Field(default=1, ge=1)
    """Processes that hold the rollouts and spans, on the nodes in turn; a run's folder keeps its number."""
    learning_rate: float = Field(default=1e-6, gt=0)
    batch: BatchSettings = BatchSettings()
    """How rollouts become rows: level, limits, rewards, groups."""
    validate_every: int = Field(default=10, ge=0)
    """Steps between two validations on val_dataset (greedy); 0 for none."""
    checkpoint_every: int = Field(default=10, ge=1)
    rollout_timeout_seconds: float = Field(default=600.0, gt=0)
    max_attempts: int = Field(default=2, ge=1)
    max_staleness: int = Field(default=0, ge=0)
    """Weight versions that a trained token may be older than the weights it trains. Above 0, rollouts are played while
    the policy is trained; 0 is strictly on-policy."""
    max_resamples: int = Field(default=3, ge=0)
    """How often in a step groups are played again that ``batch`` says to resample."""
    reproducible: bool = False
    """Every rollout samples with a seed of its own, so that the same weights give the same rollouts; a bit slower."""
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        return with_preset(given, cls.model_fields) if isinstance(given, dict) else given

    def update_settings(self, model: Path) -> UpdateSettings:
        """What the trainer ranks need of these settings. Raises ConfigError if it does not fit together."""
        values = {name: getattr(self, name) for name in LearningSettings.model_fields}
        values |= {"model_path": str(model), "device": self.engine.device, "dtype": self.engine.chosen_dtype}
        values["credit"] = "step" if self.batch.credit == "step" else "outcome"
        if self.schedule_steps is None:
            minibatches = -(-self.prompts_per_step * self.group_size // self.minibatch_rollouts)
            values["schedule_steps"] = max(self.steps * self.epochs * minibatches, 1)
        return build(UpdateSettings, values, "algorithm")

    def check(self, run: Run) -> None:
        """The model, a task, the engine's port and the memory must be there."""
        from lightning_ray.cluster import check_memory, check_port

        if isinstance(self.model, (str, Path)):
            check_model_folder(str(self.model))
        self.update_settings(Path("model"))
        if not len(run.train_dataset):
            raise ConfigError("train_dataset is empty (length 0); give at least one task")
        if self.agent_match is not None:
            check_expression("agent_match", self.agent_match)
        check_port(self.engine)
        if run.cluster.owned:
            check_memory(self.engine, self.ranks)

    async def learn(self, run: Run) -> None:
        """Play, settle, update, swap, prove; validate and save as told."""
        from lightning_ray.algorithms.loop import TrainingLoop

        await TrainingLoop(self, run).learn()
