"""What algorithms that train weights have in common: a model, its engine and trainer ranks, steps, and their limits.

A step takes the rollouts of some tasks, settles which of them are trained on, updates the policy and swaps its weights,
proved; the loop is ``algorithms.loop``'s. What is settled how, and the loss, is each algorithm's own.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from lightning_ray.algorithms.base import AlgorithmSettings
from lightning_ray.config import EngineSettings, build
from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import check_model_folder
from lightning_ray.policy.settings import TrainingSettings, UpdateSettings
from lightning_ray.run.folder import KEEP_CHECKPOINTS
from lightning_ray.run.state import ONLY
from lightning_ray.trajectories.settings import BatchSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from lightning_ray.algorithms.source import Source
    from lightning_ray.run.phases import PhaseClock
    from lightning_ray.run.run import Run
    from lightning_ray.trajectories.account import Account
    from lightning_ray.trajectories.episode import Episode


def check_expression(name: str, value: str) -> None:
    """Raises ConfigError if it is no regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{name}={value!r} is no regular expression: {error}") from None


class WeightAlgorithm(AlgorithmSettings, TrainingSettings):
    """Settings of a run that trains a model."""

    model: str | Path | Callable[[Path], None] | None
    """Folder with a Hugging Face model, or a function that makes one in the folder it is given."""
    model_name: str = "policy"
    """The model's name on the wire."""
    agent_match: str | None = None
    """Only calls of agents in whose name this regular expression is found are trained on; all without one."""
    group_size: int = Field(default=8, ge=1)
    """Rollouts of each task."""
    steps: int = Field(default=30, ge=0)
    ranks: int = Field(default=2, ge=1)
    """Trainer ranks, sharded by FSDP2."""
    store_shards: int = Field(default=1, ge=1)
    """Processes that hold the rollouts and spans, on the nodes in turn; a run's folder keeps its number."""
    batch: BatchSettings = BatchSettings()
    """How rollouts become rows: level, limits, rewards, groups."""
    validate_every: int = Field(default=10, ge=0)
    """Steps between two validations on val_dataset (greedy); 0 for none."""
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=KEEP_CHECKPOINTS, ge=1)
    """How many of the last stay; besides, the best by greedy validation does."""
    rollout_timeout_seconds: float = Field(default=600.0, gt=0)
    max_attempts: int = Field(default=2, ge=1)
    max_staleness: int = Field(default=0, ge=0)
    """Weight versions that a trained token may be older than the weights it trains. Above 0, rollouts are played while
    the policy is trained; 0 is strictly on-policy."""
    reproducible: bool = False
    """Every rollout samples with a seed of its own, so that the same weights give the same rollouts; a bit slower."""
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _fit_engine(self) -> WeightAlgorithm:
        if self.engine.transfer == "adapter" and not self.lora.rank:
            raise ValueError("engine.transfer='adapter' sends a LoRA adapter: set lora.rank too, or leave it at 'auto'")
        if self.engine.sleep and self.max_staleness:
            raise ValueError(f"engine.sleep leaves nobody to play during an update: max_staleness={self.max_staleness}")
        if self.engine.share_gpu and (self.ranks, self.engine.replicas) != (1, 1):
            raise ValueError(
                f"engine.share_gpu puts one replica beside one trainer rank, as Ray does not pair several: set ranks=1 "
                f"(not {self.ranks}) and engine.replicas=1 (not {self.engine.replicas}), or leave it out"
            )
        if self.engine.adapter_rank != self.lora.rank:
            self.engine = self.engine.model_copy(update={"adapter_rank": self.lora.rank})
        return self

    @abstractmethod
    def settle(self, episodes: Sequence[Episode], group_of: Mapping[str, str], oldest_version: int | None) -> Account:
        """Which rollouts are trained on, with which rows and reward. ``oldest_version`` bounds their weights."""

    @abstractmethod
    def source(self, run: Run, clock: PhaseClock) -> Source:
        """Where the rollouts of a step come from."""

    async def scored(self, batch: pa.Table, clock: PhaseClock) -> pa.Table:
        """The batch with what else the update needs of it."""
        return batch

    def trained(self) -> dict[str, WeightAlgorithm]:
        """The policies under training, by name: the settings of each."""
        return {ONLY: self}

    def frozen(self) -> dict[str, WeightAlgorithm]:
        """Those that are served and not trained."""
        return {}

    def pace(self) -> int:
        """How many steps a group of rollouts may wait to be trained: what the strictest policy allows."""
        return min(settings.max_staleness for settings in self.trained().values())

    def optimizer_steps(self) -> int | None:
        """How many the run will make, if that can be told: over these the learning rate falls."""
        return None

    def update_settings(self, model: Path) -> UpdateSettings:
        """What the trainer ranks need of these settings. Raises ConfigError if it does not fit together."""
        shared = UpdateSettings.model_fields.keys() & type(self).model_fields.keys()
        values = {name: getattr(self, name) for name in shared}
        values |= {"model_path": str(model), "device": self.engine.device, "dtype": self.engine.chosen_dtype}
        values["gpu_share"] = self.engine.gpu_share
        values["credit"] = "step" if self.batch.credit == "step" else "outcome"
        if self.schedule_steps is None:
            values["schedule_steps"] = self.optimizer_steps()
        return build(UpdateSettings, values, "algorithm")

    def check(self, run: Run) -> None:
        """The models, the engine's port and the memory must be there."""
        from lightning_ray.machine import check_memory, check_port

        trained, frozen = self.trained().values(), self.frozen().values()
        for settings in (*trained, *frozen):
            settings.check_policy()
        engines = [settings.engine for settings in (*trained, *frozen)]
        if len(engines) > 1 and any(engine.share_gpu for engine in engines):
            raise ConfigError(
                "engine.share_gpu=true puts a replica beside its trainer rank, and Ray would mix those of several "
                "policies: leave it out, and give each replica and rank a GPU of its own"
            )
        check_port(self.engine)
        if run.cluster.owned:
            check_memory(engines, sum(settings.ranks for settings in trained))

    def check_policy(self) -> None:
        """What is of one policy alone."""
        if self.model is None:
            raise ConfigError("algorithm.model=None: give the folder of a model, or a function that makes one")
        if isinstance(self.model, (str, Path)):
            check_model_folder(str(self.model))
        self.update_settings(Path("model"))
        if self.agent_match is not None:
            check_expression("agent_match", self.agent_match)

    async def learn(self, run: Run) -> None:
        """Settle, update, swap, prove; validate and save as told."""
        from lightning_ray.algorithms.loop import TrainingLoop

        await TrainingLoop(self, run).learn()


def check_tasks(run: Run) -> None:
    """Raises ConfigError if there is no task to play."""
    if not len(run.train_dataset):
        raise ConfigError("train_dataset is empty (length 0); give at least one task")
