"""Trained tokens as a matrix, one line a rollout: its rows one after the other, in the batch's order.

Advantages are computed on it, so that they do not see how a rollout was cut into rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_ray.policy.batch import Batch


@dataclass(frozen=True)
class TrainedTokens:
    """Where the trained tokens of R rollouts are, in a matrix [R, W] and in the batch's flat arrays."""

    shape: tuple[int, int]
    line: np.ndarray
    """Of each trained token, its rollout's place among the R."""
    place: np.ndarray
    """Of each trained token, how many of its rollout come before it."""
    flat: np.ndarray
    """Of each trained token, its index in the batch."""

    @property
    def mask(self) -> np.ndarray:
        """[R, W], float32: 1 where there is a token."""
        return self.matrix(np.ones(len(self.flat), np.float32))

    def matrix(self, values: np.ndarray) -> np.ndarray:
        """Values of the trained tokens laid out [R, W], float32, 0 elsewhere."""
        matrix = np.zeros(self.shape, np.float32)
        matrix[self.line, self.place] = values
        return matrix

    def scatter(self, matrix: np.ndarray, length: int) -> np.ndarray:
        """A matrix [R, W] as a flat array of the batch's ``length``, float32, 0 where nothing is trained."""
        array = np.zeros(length, np.float32)
        array[self.flat] = matrix[self.line, self.place]
        return array


def trained_tokens(batch: Batch, rollouts: np.ndarray) -> TrainedTokens:
    """The trained tokens of the rollouts with these (ascending) indices."""
    order = np.argsort(batch.row_rollout, kind="stable")
    order = order[np.isin(batch.row_rollout[order], rollouts)]
    tokens = np.concatenate([np.arange(batch.offsets[row], batch.offsets[row + 1]) for row in order])
    owner = np.repeat(np.searchsorted(rollouts, batch.row_rollout[order]), batch.lengths[order])
    trained = batch.mask[tokens] > 0
    flat, line = tokens[trained], owner[trained]
    counts = np.bincount(line, minlength=len(rollouts))
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    return TrainedTokens((len(rollouts), int(counts.max(initial=1))), line, place, flat)
