"""Credit of each model call by its own reward: process supervision, "DeepSeekMath" (Shao et al., 2024), 4.1.3.

All step rewards r of a group are normalised together, r~ = (r - mean) / std, and a token's advantage is the sum of the
r~ of its rollout's steps that end at or after it. A step is a model call; it ends at the last token that it sampled.
"""

from __future__ import annotations

import numpy as np

from lightning_ray.policy.batch import Batch
from lightning_ray.policy.trained_tokens import TrainedTokens

EPSILON = 1e-6
"""Added to the deviation, as in the outcome's advantage."""


def step_ends(batch: Batch) -> np.ndarray:
    """Whether each token of the batch ends a step: the last of a run of sampled tokens, or one with a reward."""
    assert batch.step_rewards is not None
    sampled = batch.mask > 0
    follows = np.append(sampled[1:], False)
    follows[batch.offsets[1:] - 1] = False
    return sampled & (~follows | (np.nan_to_num(batch.step_rewards) != 0))


def step_advantages(batch: Batch, tokens: TrainedTokens, group: np.ndarray, by_std: bool) -> np.ndarray:
    """Advantages [R, W], float32. ``group`` is of each of the R rollouts.

    Raises ValueError if the batch has no ``step_rewards``.
    """
    if batch.step_rewards is None:
        raise ValueError("credit='step' needs the column 'step_rewards', which the batch lacks")
    ends = tokens.matrix(step_ends(batch)[tokens.flat]) > 0
    rewards = tokens.matrix(np.nan_to_num(batch.step_rewards)[tokens.flat]).astype(np.float64)
    normalised = np.zeros_like(rewards)
    for index in np.unique(group):
        steps = ends & (group == index)[:, None]
        values = rewards[steps]
        deviation = values.std(ddof=1) + EPSILON if by_std and len(values) > 1 else 1.0
        normalised[steps] = (values - values.mean()) / deviation
    return np.cumsum(normalised[:, ::-1], axis=1)[:, ::-1].astype(np.float32) * tokens.mask
