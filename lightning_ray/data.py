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
        return [self._at(position // size, position % size) for position in range(start, start + count)]

    def _at(self, epoch: int, offset: int) -> Any:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return self.dataset[int(order[offset])]
