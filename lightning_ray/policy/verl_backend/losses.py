"""The loss of a minibatch: verl's policy losses, token by token, weighted and summed here.

Invariant: the weights are of the whole minibatch, so results of micro batches and ranks add up to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.verl_backend.correction import Correction, correct
from lightning_ray.policy.verl_backend.divergence import divergence

LossFunction = Callable[..., tuple[torch.Tensor, dict[str, float]]]
PEAKS = ("ratio_max",)
"""Names among a loss' figures of which the largest counts; the others add up."""


def minibatch_loss(settings: UpdateSettings, ranks: int) -> LossFunction:
    """The loss function of one minibatch, as verl's engine calls it for each micro batch.

    A micro batch has ``mask``, ``logprobs`` (the engine's), ``old_logprobs``, ``advantages`` and ``weight``, and
    ``reference`` where there is a penalty in the loss; all (B, T - 1) float32. The result is multiplied by ``ranks``
    because FSDP averages gradients over ranks. Of a likelihood objective ``mask`` and ``weight`` are all that counts.
    """
    if settings.objective == "likelihood":
        return _likelihood_loss(ranks)
    policy_loss = _policy_loss(settings)

    def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, float]]:
        mask, logprobs = data["mask"], model_output["log_probs"]
        weight = data["weight"] * mask
        trainer = data["old_logprobs"] if settings.old_logprobs == "trainer" else logprobs
        correction = correct(settings.correction, trainer, data["logprobs"], mask)
        factor = weight * correction.factor
        figures = _correction_figures(correction, mask)
        value, clipped = policy_loss(data["old_logprobs"], logprobs, data["advantages"], mask, factor)
        figures["clipped"] = clipped
        if settings.reference.coefficient and settings.reference.place == "loss":
            apart = divergence(logprobs, data["reference"], settings.reference.estimator)
            value = value + settings.reference.coefficient * (apart * weight).sum()
            figures["reference_kl"] = float((apart.detach() * mask).sum())
        if settings.entropy_bonus:
            value = value - settings.entropy_bonus * (model_output["entropy"] * weight).sum()
        return value * ranks, figures

    return loss


def _likelihood_loss(ranks: int) -> LossFunction:
    """The negative log-likelihood of the trained tokens."""

    def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, float]]:
        surprise = -model_output["log_probs"] * data["mask"]
        return (surprise * data["weight"]).sum() * ranks, {"nll": float(surprise.detach().sum())}

    return loss


def _policy_loss(settings: UpdateSettings) -> Callable[..., tuple[torch.Tensor, float]]:
    """A function of old and new logprobs, advantages, mask and factor: the sum of factor times loss of each token, and
    how many were clipped.
    """
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio=settings.clip_low,
        clip_ratio_low=settings.clip_low,
        clip_ratio_high=settings.clip_high,
        clip_ratio_c=settings.dual_clip,
        tau_pos=settings.tau_positive,
        tau_neg=settings.tau_negative,
        policy_loss=PolicyLossConfig(loss_mode=settings.loss),
        loss_agg_mode="token-sum",
        global_batch_info={"dp_size": 1, "global_batch_size": 1},
    )
    compute = get_policy_loss_fn(settings.loss)

    def policy_loss(
        old: torch.Tensor, new: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        if settings.loss == "sapo":  # averages over a row whatever it is told
            factor = factor * mask.sum(-1, keepdim=True)
        value, metrics = compute(
            old_log_prob=old,
            log_prob=new,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="token-sum",
            config=config,
            rollout_is_weights=factor,
        )
        # verl's share is over this micro batch's tokens; as a count it can be summed.
        return value, metrics.get("actor/pg_clipfrac", 0.0) * float(mask.sum())

    return policy_loss


def _correction_figures(correction: Correction, mask: torch.Tensor) -> dict[str, float]:
    """Counts over the trained tokens of a micro batch; read from the device at once."""
    ratio = correction.ratio * mask
    counts = (ratio.sum(), ratio.max(), correction.beyond.sum(), correction.rejected.sum())
    return dict(zip(("ratio", "ratio_max", "capped", "rejected"), torch.stack(counts).tolist(), strict=True))
