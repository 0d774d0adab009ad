"""What a policy update is told: the model, the optimizer and the loss.

Importable without torch. Names of estimators and losses are verl's; only those are admitted whose result does
not depend on how a batch is split over ranks and micro batches.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from lightning_ray.config import Settings
from lightning_ray.errors import LightningRayError
from lightning_ray.policy.parts import CorrectionSettings, LoraSettings, ReferenceSettings

AdvantageName = Literal["grpo", "rloo", "opo", "gpg", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "reward"]
LossName = Literal["vanilla", "gspo", "cispo", "sapo", "gpg", "dppo_tv", "dppo_kl"]
Aggregation = Literal[
    "rollout-mean",
    "rollout-sum",
    "rollout-sum-norm",
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]


class DivergedError(LightningRayError):
    """The loss or its gradient is not a finite number; the weights were left as they were."""


class OptimizerSettings(Settings):
    """AdamW and its learning rate over the optimizer steps."""

    learning_rate: float = Field(default=6e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    warmup_steps: int = Field(default=5, ge=0)
    """Optimizer steps over which the rate rises linearly; the first of them has a rate of 0."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, warm-up included, after which ``linear`` and ``cosine`` have reached their end."""
    end_learning_rate: float = Field(default=0.0, ge=0)
    """Where ``linear`` and ``cosine`` end."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Upper bound of the global gradient norm."""


class TrainingSettings(OptimizerSettings):
    """What is trained, in which portions, and how a loss is averaged, whatever the loss."""

    loss_aggregation: Aggregation = "token-mean"
    """Over the trained tokens of a minibatch, its rollouts, or its rows (``seq``: a row is one trajectory)."""
    loss_horizon: int | None = Field(default=None, gt=0)
    """Tokens by which ``rollout-sum-norm`` and ``seq-mean-token-sum-norm`` divide a sum."""
    lora: LoraSettings = LoraSettings()
    epochs: int = Field(default=1, ge=1)
    """Passes over a batch."""
    minibatch_rollouts: int = Field(default=64, ge=1)
    """At most this many rollouts to an optimizer step."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens to a forward pass; a longer row goes alone. Changes cost and memory, not results: small
    ones stay in a CPU's cache, a GPU wants tens of thousands."""
    seed: int = 0

    @model_validator(mode="after")
    def _horizon_where_needed(self) -> TrainingSettings:
        if self.loss_aggregation.endswith("-norm") != (self.loss_horizon is not None):
            raise ValueError(
                "loss_horizon belongs to loss_aggregation='rollout-sum-norm' or 'seq-mean-token-sum-norm': set both, "
                f"for instance loss_horizon=1024, or neither (got {self.loss_aggregation!r}, {self.loss_horizon})"
            )
        return self


class LearningSettings(TrainingSettings):
    """Advantages and loss; what an algorithm that learns from rewards lets its user choose."""

    advantage: AdvantageName = "grpo"
    """How rewards become advantages, over the rollouts of a group. ``reward`` takes the reward itself."""
    advantage_by_std: bool = True
    """Divide by the group's standard deviation (``grpo`` only; Dr. GRPO does not)."""
    loss: LossName = "vanilla"
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    dual_clip: float = Field(default=3.0, gt=1)
    """Largest ratio that counts where the advantage is negative (``vanilla``; Ye et al., 2019), or at all
    (``dppo_...``)."""
    tau_positive: float = Field(default=1.0, gt=0)
    """``sapo``'s temperature where the advantage is positive."""
    tau_negative: float = Field(default=1.05, gt=0)
    """``sapo``'s temperature elsewhere."""
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """Ratios are against the engine's logprobs as sampled, or the trainer's before the first step of the update
    (decoupled PPO: Hilton et al., 2021, "Batch size-invariance for policy optimization"), at one forward pass more."""
    correction: CorrectionSettings = CorrectionSettings()
    reference: ReferenceSettings = ReferenceSettings()
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy (nats), which the loss then rewards."""

    @model_validator(mode="after")
    def _weights_count_once(self) -> LearningSettings:
        if self.correction.weights != "none" and self.old_logprobs == "engine" and self.loss != "gpg":
            raise ValueError(
                f"correction.weights={self.correction.weights!r} would count the ratio twice, which loss={self.loss!r} "
                "takes against the engine already: set old_logprobs='trainer', or loss='gpg', which has no ratio"
            )
        return self


class UpdateSettings(LearningSettings):
    """Settings of the policy update; the same on every rank."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_path: str
    """Folder with the initial policy in Hugging Face format: config.json, safetensors, tokenizer."""
    device: Literal["cpu", "cuda"] = "cpu"
    gpu_share: float = Field(default=1.0, ge=0)
    """GPUs of a rank on CUDA, as Ray counts them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; the optimizer always works on float32 weights."""
    objective: Literal["policy", "likelihood"] = "policy"
    """``likelihood`` trains the negative log-likelihood of what was sampled, whatever the rewards."""
    reward_weight: float = Field(default=1.0, ge=0)
    """Weight of what rewards give a token's advantage."""
    teacher_weight: float = Field(default=0.0, ge=0)
    """Weight of what a teacher does (column ``teacher_logprobs``): its log probability of the token less the policy's
    before the first step, which lets the reverse divergence from the teacher fall."""
    credit: Literal["outcome", "step"] = "outcome"
    """One reward a rollout, or one each model call (column ``step_rewards``): DeepSeekMath's process supervision."""
    check_logprobs: bool = True
    """Compare the engine's logprobs with the trainer's before the first step (one more forward pass, but for
    the first minibatch)."""

    @model_validator(mode="after")
    def _schedule_ends(self) -> UpdateSettings:
        if self.schedule != "constant" and self.schedule_steps is None:
            raise ValueError(f"schedule={self.schedule!r} needs schedule_steps, the optimizer steps until its end")
        return self

    @model_validator(mode="after")
    def _steps_where_needed(self) -> UpdateSettings:
        if self.credit == "step" and self.advantage != "grpo":
            raise ValueError(f"credit='step' belongs to advantage='grpo' (got {self.advantage!r})")
        if self.credit == "step" and self.reference.place == "reward":
            raise ValueError("credit='step' has no one reward to penalise: set reference.place='loss'")
        return self
