"""Advantages of rollouts, computed by verl's ``core_algos``.

Invariant: they are statistics of rollouts, not of rows, so they do not depend on how rollouts were cut into rows, micro
batches or ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from lightning_ray.policy.settings import UpdateSettings

OVER_ALL_ROLLOUTS = ("reward", "reinforce_plus_plus")


def needs_group(settings: UpdateSettings) -> bool:
    """Whether a rollout is compared with others of its group."""
    return settings.advantage not in OVER_ALL_ROLLOUTS


def outcome_advantages(
    settings: UpdateSettings, reward: np.ndarray, group: np.ndarray, mask: np.ndarray, penalty: np.ndarray | None
) -> np.ndarray:
    """Advantages [R, W], float32, of R rollouts whose trained tokens ``mask`` [R, W] marks, from the left.

    ``reward`` and ``group`` are of each rollout. ``penalty`` [R, W] is taken off the tokens' rewards; most estimators
    sum a rollout's rewards, REINFORCE++ sums those from a token on.

    Where rollouts are compared within their group, one that is alone has nothing to exceed: its advantage is 0, and it
    is in no statistic. (verl takes a group of one's mean for 0, which would make its advantage the bare reward.)
    """
    compared = np.bincount(group)[group] > 1 if needs_group(settings) else np.ones(len(group), bool)
    advantages = np.zeros_like(mask)
    if compared.any():
        several = None if penalty is None else penalty[compared]
        advantages[compared] = _estimate(settings, reward[compared], group[compared], mask[compared], several)
    return advantages


def _estimate(
    settings: UpdateSettings, reward: np.ndarray, group: np.ndarray, mask: np.ndarray, penalty: np.ndarray | None
) -> np.ndarray:
    """verl's estimate."""
    rewards = np.zeros_like(mask)
    rewards[np.arange(len(reward)), np.maximum(mask.sum(-1).astype(np.int64), 1) - 1] = reward
    if penalty is not None:
        rewards -= penalty * mask
    if settings.advantage == "reward":
        return rewards.sum(-1, keepdims=True) * mask
    options: dict[str, Any] = {"config": AlgoConfig(gamma=1.0), "index": group}
    if settings.advantage == "grpo":
        options["norm_adv_by_std_in_grpo"] = settings.advantage_by_std
    estimate = get_adv_estimator_fn(settings.advantage)
    advantages, _ = estimate(
        token_level_rewards=torch.from_numpy(rewards), response_mask=torch.from_numpy(mask), **options
    )
    return advantages.numpy().astype(np.float32) * mask
