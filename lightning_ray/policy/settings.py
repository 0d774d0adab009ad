"""What a policy update is told: the model, the optimizer and the loss.

Importable without torch. Names of estimators and losses are verl's; only those are admitted whose result does
not depend on how a batch is split over ranks and micro batches, and whose advantage is one number a rollout.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lightning_ray.errors import LightningRayError

AdvantageName = Literal["grpo", "rloo", "opo", "gpg", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "reward"]
LossName = Literal["vanilla", "gspo", "cispo", "sapo", "gpg", "dppo_tv", "dppo_kl"]
Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


class DivergedError(LightningRayError):
    """The loss or its gradient is not a finite number; the weights were left as they were."""


class UpdateSettings(BaseModel):
    """Settings of the policy update; the same on every rank."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_path: str
    """Folder with the initial policy in Hugging Face format: config.json, safetensors, tokenizer."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; the optimizer always works on float32 weights."""

    learning_rate: float = Field(default=6e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=5, ge=0)
    """Optimizer steps over which the rate rises linearly; the first of them has a rate of 0."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Upper bound of the global gradient norm."""

    advantage: AdvantageName = "grpo"
    """How rewards become advantages, over the rollouts of a group. ``reward`` takes the reward itself."""
    advantage_by_std: bool = True
    """Divide by the group's standard deviation (``grpo`` only; Dr. GRPO does not)."""
    loss: LossName = "vanilla"
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    loss_aggregation: Aggregation = "token-mean"
    """Over the trained tokens of a whole minibatch, or over its rows (``seq``: a row is one trajectory)."""
    loss_horizon: int | None = Field(default=None, gt=0)
    """Tokens by which ``seq-mean-token-sum-norm`` divides a row's sum."""

    epochs: int = Field(default=1, ge=1)
    minibatch_rollouts: int = Field(default=64, ge=1)
    """At most this many rollouts to an optimizer step."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens to a forward pass; a longer row goes alone. Changes cost and memory, not results: small
    ones stay in a CPU's cache, a GPU wants tens of thousands."""
    check_logprobs: bool = True
    """Compare the engine's logprobs with the trainer's before the first step (one more forward pass, but for
    the first minibatch)."""
    seed: int = 0

    @model_validator(mode="after")
    def _horizon_where_needed(self) -> UpdateSettings:
        if (self.loss_aggregation == "seq-mean-token-sum-norm") != (self.loss_horizon is not None):
            raise ValueError(
                "loss_horizon belongs to loss_aggregation='seq-mean-token-sum-norm': set both, for instance "
                f"loss_horizon=1024, or neither (got {self.loss_aggregation!r}, {self.loss_horizon})"
            )
        return self
