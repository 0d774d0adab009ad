"""Importance weights and rejection between trainer and engine, computed by verl's ``rollout_corr_helper``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights, compute_rollout_rejection_mask

from lightning_ray.policy.parts import CorrectionSettings


@dataclass(frozen=True)
class Correction:
    """What a token's loss is multiplied by, and how that came about; all (B, T - 1) float32 without gradient."""

    factor: torch.Tensor
    """The weight, 0 where rejected."""
    ratio: torch.Tensor
    """What was capped: of the token or of its row; trainer over engine."""
    beyond: torch.Tensor
    """1 where the ratio exceeds the cap or falls below the floor, whether or not it is a weight."""
    rejected: torch.Tensor
    """1 where the token is left out."""


def verl_name(rejection: str) -> str:
    """verl's name of a rejection: what is a row here is a sequence there."""
    return rejection.replace("row_", "seq_")


def correct(
    settings: CorrectionSettings, logprobs: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor
) -> Correction:
    """The correction of tokens with these log probabilities of trainer and engine, where ``mask`` is 1."""
    log_ratio = (logprobs.detach() - engine) * mask
    ratio = log_ratio.sum(-1, keepdim=True).expand_as(mask) if settings.weights == "sequence" else log_ratio
    ratio = ratio.clamp(-20, 20).exp()
    factor = torch.ones_like(mask)
    beyond = ((ratio > settings.cap) | (ratio < (settings.floor or 0.0))).float()
    if settings.weights != "none" and mask.any():
        threshold = settings.cap if settings.floor is None else f"{settings.floor}_{settings.cap}"
        factor, _ = compute_rollout_correction_weights(log_ratio, mask, settings.weights, threshold)
    kept = torch.ones_like(mask)
    if settings.reject and mask.any():
        kept, _ = compute_rollout_rejection_mask(
            log_ratio, mask, ",".join(map(verl_name, settings.reject)), _thresholds(settings)
        )
    return Correction(factor * kept, ratio, beyond * mask, mask * (1 - kept))


def _thresholds(settings: CorrectionSettings) -> str:
    """One for each rejection. verl's k1 is the engine's probability over the trainer's: the band is turned round."""
    low, high = settings.band
    band = f"{1 / high!r}_{1 / low!r}"
    return ",".join(band if name.endswith("k1") else repr(settings.limit) for name in settings.reject)
