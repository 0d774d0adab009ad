"""How old the weights were that sampled the tokens of a batch."""

from __future__ import annotations

import numpy as np

from lightning_ray.policy.batch import Batch


def staleness(batch: Batch, version: int) -> dict[str, float]:
    """Shares of the trained tokens by their age in weight versions, ``staleness_0``, ``staleness_1`` and so on, and
    ``staleness_mean`` and ``staleness_max``; nothing if the batch does not tell versions.

    ``version`` is that of the weights about to be trained.
    """
    trained = batch.mask > 0
    if batch.weight_versions is None or not trained.any():
        return {}
    ages, counts = np.unique(version - batch.weight_versions[trained].astype(np.int64), return_counts=True)
    shares = {f"staleness_{age}": float(count / counts.sum()) for age, count in zip(ages, counts, strict=True)}
    mean = float((ages * counts).sum() / counts.sum())
    return shares | {"staleness_mean": mean, "staleness_max": float(ages.max())}
