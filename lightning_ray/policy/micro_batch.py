"""Rows of a batch as the padded tensors of one forward pass, and what is measured on them."""

from __future__ import annotations

from collections.abc import Mapping
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


def pad_rows(batch: Batch, rows: np.ndarray, columns: Mapping[str, np.ndarray]) -> TensorDict:
    """Rows (B) padded on the right to their longest (T); no rows give one row of padding.

    ``token_ids`` (B, T); ``mask``, each of ``columns`` (values of the batch's tokens) and ``wanted``, which is the mask
    as bool, (B, T - 1): they belong to the tokens after the first, and are 0 where the mask is.
    """
    lengths = batch.lengths[rows] if len(rows) else np.zeros(1, np.int64)
    starts = batch.offsets[rows] if len(rows) else np.zeros(1, np.int64)
    steps = np.arange(int(lengths.max(initial=2)))
    inside = steps < lengths[:, None]
    place = np.where(inside, starts[:, None] + steps, 0)
    wanted = (inside & (batch.mask[place] > 0))[:, 1:]
    after_first = {name: np.where(wanted, column[place[:, 1:]], 0) for name, column in columns.items()}
    arrays = {"token_ids": np.where(inside, batch.token_ids[place], 0).astype(np.int64), "wanted": wanted}
    arrays |= {name: array.astype(np.float32) for name, array in (after_first | {"mask": wanted}).items()}
    return TensorDict({name: torch.from_numpy(array) for name, array in arrays.items()}, batch_size=len(lengths))


class Tally:
    """Figures of micro batches, summed up or the largest kept, then over ranks, which must count the same names."""

    def __init__(self, peaks: tuple[str, ...] = ()) -> None:
        self._peaks = peaks
        self._values: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Count the figures of one micro batch."""
        for name, value in values.items():
            before = self._values.get(name)
            if before is None:
                self._values[name] = value
            else:
                self._values[name] = max(before, value) if name in self._peaks else before + value

    def over_ranks(self, device: torch.device) -> dict[str, float]:
        """The figures of all ranks; collective."""
        result: dict[str, float] = {}
        for operation, peaks in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
            names = [name for name in sorted(self._values) if (name in self._peaks) == peaks]
            if names:
                total = torch.tensor([self._values[name] for name in names], dtype=torch.float64, device=device)
                dist.all_reduce(total, op=operation)
                result |= dict(zip(names, total.tolist(), strict=True))
        return result


class LogprobGap:
    """How far the trainer's log probabilities of trained tokens are from the engine's, over all ranks; of the tokens
    that were sampled with the weights about to be trained (``fresh``), as others may differ.
    """

    def __init__(self) -> None:
        self._tally = Tally(peaks=("largest",))

    def add(self, logprobs: torch.Tensor, micro: TensorDict) -> None:
        """Count a micro batch; ``logprobs`` (B, T - 1) are the trainer's."""
        gaps = (logprobs.cpu() - micro["logprobs"])[micro["wanted"] & (micro["fresh"] > 0)].abs()
        largest = float(gaps.max()) if len(gaps) else 0.0
        self._tally.add({"largest": largest, "total": float(gaps.sum()), "tokens": float(len(gaps))})

    def over_ranks(self, device: torch.device) -> dict[str, float]:
        """The largest and the mean gap, in nats, if there was a token; collective."""
        total = self._tally.over_ranks(device)
        if not total["tokens"]:
            return {}
        return {"max_logprob_diff": total["largest"], "mean_logprob_diff": total["total"] / total["tokens"]}
