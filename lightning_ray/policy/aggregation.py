"""What a trained token weighs in the loss: the loss of a minibatch is the sum of weight times loss over its tokens.

With N trained tokens, R rollouts and S rows in the minibatch, n_r tokens in rollout r, n_s in row s, and a horizon H:

    token-mean               1 / N             DAPO (Yu et al., 2025), section 3.3
    token-sum                1
    rollout-mean             1 / (R n_r)       GRPO (Shao et al., 2024), equation 3, an output being a whole rollout
    rollout-sum              1 / R             REINFORCE of whole rollouts
    rollout-sum-norm         1 / (R H)         Dr. GRPO (Liu et al., 2025)
    seq-mean-token-mean      1 / (S n_s)
    seq-mean-token-sum       1 / S
    seq-mean-token-sum-norm  1 / (S H)

``rollout-...`` counts a rollout once, in however many rows it came. Rollouts and rows without a trained token do not
count.
"""

from __future__ import annotations

import numpy as np

from lightning_ray.policy.batch import Batch
from lightning_ray.policy.settings import Aggregation


def row_weights(batch: Batch, rows: np.ndarray, aggregation: Aggregation, horizon: int | None) -> np.ndarray:
    """The weight of a trained token of each row of a minibatch, float64 [len(rows)].

    A rollout's rows must be in one minibatch.
    """
    trained = batch.trained_per_row()[rows]
    rollout = batch.row_rollout[rows]
    ones = np.ones(len(rows))
    if aggregation == "token-sum":
        return ones
    if aggregation == "token-mean":
        return ones / max(trained.sum(), 1)
    if aggregation.startswith("rollout"):
        tokens = np.bincount(rollout, trained)[rollout]
        count = len(np.unique(rollout[trained > 0]))
    else:
        tokens, count = trained.astype(np.float64), int((trained > 0).sum())
    weights = ones / max(count, 1)
    if aggregation in ("rollout-mean", "seq-mean-token-mean"):
        weights = weights / np.maximum(tokens, 1)
    return weights / (horizon or 1)
