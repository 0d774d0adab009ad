"""Advantages and losses, computed by verl's ``core_algos``.

Invariant: advantages are statistics of rollouts, not of rows, and a loss is normalised over the whole
minibatch across ranks, so neither depends on how rollouts were cut into rows, micro batches or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    POLICY_LOSS_REGISTRY,
    get_adv_estimator_fn,
    get_policy_loss_fn,
)
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from lightning_ray.errors import ConfigError
from lightning_ray.policy.settings import AdvantageName, LossName, UpdateSettings
from lightning_ray.policy.verl_backend import VERL_VERSION

LossFunction = Callable[..., tuple[torch.Tensor, dict[str, Any]]]
OVER_ALL_ROLLOUTS = ("reward", "reinforce_plus_plus")


def check_names() -> None:
    """Raise ConfigError if a name that the settings admit is not in verl's registries."""
    names = {*get_args(AdvantageName)} - {"reward"} - ADV_ESTIMATOR_REGISTRY.keys()
    names |= {*get_args(LossName)} - POLICY_LOSS_REGISTRY.keys()
    if names:
        raise ConfigError(f"verl does not know {sorted(names)}: install verl=={VERL_VERSION} unchanged")


def needs_group(settings: UpdateSettings) -> bool:
    """Whether a rollout is compared with others of its group, so that one alone teaches nothing."""
    return settings.advantage not in OVER_ALL_ROLLOUTS


def rollout_advantages(
    settings: UpdateSettings, reward: np.ndarray, group: np.ndarray, trained: np.ndarray
) -> np.ndarray:
    """One advantage for each rollout, float32.

    ``reward`` and ``group`` are of each rollout; ``trained`` is its number of trained tokens, which some
    estimators weigh by. All tokens of a rollout share its advantage.
    """
    if settings.advantage == "reward":
        return reward.astype(np.float32)
    width = max(int(trained.max()), 1)
    mask = torch.from_numpy((np.arange(width) < np.maximum(trained, 1)[:, None]).astype(np.float32))
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(reward)), np.maximum(trained, 1) - 1] = torch.tensor(reward, dtype=torch.float32)
    options: dict[str, Any] = {"config": AlgoConfig(gamma=1.0), "index": group}
    if settings.advantage == "grpo":
        options["norm_adv_by_std_in_grpo"] = settings.advantage_by_std
    estimate = get_adv_estimator_fn(settings.advantage)
    advantages, _ = estimate(token_level_rewards=rewards, response_mask=mask, **options)
    return advantages[:, 0].numpy().astype(np.float32)


def minibatch_loss(settings: UpdateSettings, tokens: int, rows: int, ranks: int) -> LossFunction:
    """The loss function of one minibatch, as verl's engine calls it for each micro batch.

    ``tokens`` and ``rows`` are the trained ones of the minibatch over all ranks. Results of micro batches add
    up; each is multiplied by ``ranks`` because FSDP averages gradients over ranks.
    """
    # A fresh one for each minibatch: verl keeps the normalisation on it, and would reuse an old one.
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio=settings.clip_low,
        clip_ratio_low=settings.clip_low,
        clip_ratio_high=settings.clip_high,
        policy_loss=PolicyLossConfig(loss_mode=settings.loss),
        loss_agg_mode=settings.loss_aggregation,
        global_batch_info={
            "dp_size": ranks,
            "batch_num_tokens": tokens,
            "global_batch_size": rows,
            "loss_scale_factor": settings.loss_horizon,
        },
    )
    compute = get_policy_loss_fn(settings.loss)

    def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        mask = data["mask"]
        value, metrics = compute(
            old_log_prob=data["logprobs"],
            log_prob=model_output["log_probs"],
            advantages=data["advantages"],
            response_mask=mask,
            loss_agg_mode=settings.loss_aggregation,
            config=config,
        )
        # The share is over this micro batch's tokens; as a count it can be summed.
        return value, {"clipped": metrics.get("actor/pg_clipfrac", 0.0) * float(mask.sum())}

    return loss
