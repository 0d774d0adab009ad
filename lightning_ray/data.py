"""Order of the training tasks: every epoch is a fresh shuffle that depends on the seed and the epoch alone.

So any step's tasks can be told without having played the steps before it: that is all a resume needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_ray.types import Dataset


@dataclass(frozen=True)
class Epochs:
    """An endless sequence over a data set."""

    dataset: Dataset[Any]
    seed: int

    def take(self, start: int, count: int) -> list[Any]:
        """The tasks at positions ``start`` to ``start + count`` of the sequence."""
        size = len(self.dataset)
        positions = range(start, start + count)
        orders = {epoch: self._order(epoch) for epoch in {position // size for position in positions}}
        return [self.dataset[int(orders[position // size][position % size])] for position in positions]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
