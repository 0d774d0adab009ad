"""Rows of a batch as the padded tensors of one forward pass, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict

from lightning_ray.policy.batch import Batch


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step is computed from."""

    micro_batches: list[TensorDict]
    """This rank's part."""
    tokens: int
    """Trained tokens over all ranks."""
    rows: int
    """Rows with a trained token over all ranks."""


def pad_rows(batch: Batch, advantage: np.ndarray, rows: np.ndarray) -> TensorDict:
    """Rows (B) padded on the right to their longest (T); no rows give one row of padding.

    ``token_ids`` (B, T); ``mask``, ``logprobs``, ``advantages`` and ``wanted``, which is the mask as bool,
    (B, T - 1): they belong to the tokens after the first. ``advantage`` is of each rollout.
    """
    shape = (max(len(rows), 1), int(batch.lengths[rows].max(initial=2)))
    token_ids = np.zeros(shape, np.int64)
    mask, logprobs, advantages = (np.zeros(shape, np.float32) for _ in range(3))
    for line, row in enumerate(rows):
        here = slice(batch.offsets[row], batch.offsets[row + 1])
        length = batch.lengths[row]
        token_ids[line, :length] = batch.token_ids[here]
        mask[line, :length] = batch.mask[here]
        logprobs[line, :length] = batch.logprobs[here]
        advantages[line] = advantage[batch.row_rollout[row]]
    after_first = {"mask": mask, "logprobs": logprobs, "advantages": advantages, "wanted": mask > 0}
    tensors = {name: torch.from_numpy(array[:, 1:]) for name, array in after_first.items()}
    return TensorDict({"token_ids": torch.from_numpy(token_ids), **tensors}, batch_size=shape[0])


class LogprobGap:
    """How far the trainer's log probabilities of trained tokens are from the engine's, over all ranks."""

    def __init__(self) -> None:
        self._largest, self._total, self._tokens = 0.0, 0.0, 0

    def add(self, logprobs: torch.Tensor, micro: TensorDict) -> None:
        """Count a micro batch; ``logprobs`` (B, T - 1) are the trainer's."""
        gaps = (logprobs.cpu() - micro["logprobs"])[micro["wanted"]].abs()
        if len(gaps):
            self._largest = max(self._largest, float(gaps.max()))
            self._total += float(gaps.sum())
            self._tokens += len(gaps)

    def over_ranks(self, device: torch.device) -> dict[str, float]:
        """The largest and the mean gap, in nats; collective."""
        sums = torch.tensor([self._total, self._tokens], dtype=torch.float64, device=device)
        largest = torch.tensor(self._largest, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return {"max_logprob_diff": float(largest), "mean_logprob_diff": float(sums[0] / sums[1])}
