"""Parts of the settings of an update that are off unless asked for: reference model, off-policy correction, LoRA."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lightning_ray.config import Settings

Divergence = Literal["k1", "k2", "k3"]
Rejection = Literal[
    "token_k1", "token_k2", "token_k3", "row_mean_k1", "row_mean_k2", "row_mean_k3", "row_max_k2", "row_max_k3"
]


class ReferenceSettings(Settings):
    """How far the policy may go from a reference model: a penalty on the estimated KL divergence."""

    coefficient: float = Field(default=0.0, ge=0)
    """Weight of the penalty; at 0 no reference model is loaded."""
    estimator: Divergence = "k3"
    """With d = log p - log p_reference of a sampled token: k1 is d, k2 is d^2 / 2, k3 (of low variance) is
    exp(-d) - 1 + d (Schulman, 2020, "Approximating KL Divergence")."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss (DeepSeekMath, equation 3), or taken off each token's reward (Ouyang et al., 2022)."""
    model: str | None = None
    """Folder of the reference; without one it is the model that training began with (with LoRA, the bare base)."""


class CorrectionSettings(Settings):
    """What is done where the trainer's probability of a sampled token is not the engine's.

    The ratio is trainer over engine. A sequence is a row (trajectory). Rejected tokens keep their place in the
    loss' denominator, so that rejecting makes a step smaller and not more of the rest.
    """

    weights: Literal["none", "token", "sequence"] = "none"
    """Multiply a token's loss by the ratio of the token, or by the product of its sequence's ratios."""
    cap: float = Field(default=2.0, gt=0)
    """Larger weights are this (truncated importance sampling; Yao et al., 2025), or 0 if there is a ``floor``."""
    floor: float | None = Field(default=None, gt=0)
    """With it, weights outside of floor to cap are 0 (IcePop; Ling team, 2025)."""
    reject: tuple[Rejection, ...] = ()
    """Leave out tokens or rows by the divergence of the two models: k1 the ratio itself, k2 log(ratio)^2 / 2, k3
    ratio - 1 - log(ratio); ``row_mean`` over a row's tokens (for k1 geometric), ``row_max`` the row's largest."""
    band: tuple[float, float] = (0.5, 2.0)
    """Ratios that k1 keeps."""
    limit: float = Field(default=0.1, gt=0)
    """Largest divergence that k2 and k3 keep."""

    @model_validator(mode="after")
    def _in_order(self) -> CorrectionSettings:
        if self.floor is not None and self.floor > self.cap:
            raise ValueError(f"floor={self.floor} is above cap={self.cap}")
        if not 0 < self.band[0] <= self.band[1]:
            raise ValueError(f"band={self.band} must be two ratios above 0, the smaller first")
        return self

    @property
    def active(self) -> bool:
        """Whether it does anything."""
        return self.weights != "none" or bool(self.reject)


class LoraSettings(Settings):
    """Low-rank adapters, the only weights then trained (Hu et al., 2021, "LoRA"), through PEFT. ``True`` is rank
    16, ``False`` for none.
    """

    rank: int = Field(default=0, ge=0)
    """0 trains all weights instead."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's product is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of modules that get an adapter, or ``all-linear``: all but embeddings and head."""

    @model_validator(mode="before")
    @classmethod
    def _on_or_off(cls, given: Any) -> Any:
        return {"rank": 16 if given else 0} if isinstance(given, bool) else given
