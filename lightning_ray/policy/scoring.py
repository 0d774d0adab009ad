"""Log probabilities of a batch's trained tokens under the policy and the reference, without a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict

from lightning_ray.policy.batch import Batch
from lightning_ray.policy.micro_batch import pad_rows
from lightning_ray.policy.plan import assign_rows
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.verl_backend.engine import PaddedEngine, build_reference


class Scorer:
    """One rank of the models that score. Its methods are collective."""

    def __init__(self, settings: UpdateSettings, engine: PaddedEngine, rank: int, world_size: int) -> None:
        """Load the reference, if there is one; with LoRA the policy without its adapter serves for it."""
        self._settings = settings
        self._engine = engine
        self._rank = rank
        self._world_size = world_size
        self._reference: PaddedEngine | None = None
        own_base = settings.lora.rank and settings.reference.model is None
        if settings.reference.coefficient and not own_base:
            self._reference = build_reference(settings)

    def forward(self, micro: TensorDict) -> dict[str, torch.Tensor]:
        """Log probabilities and entropies of a micro batch under the policy."""
        return _forward(self._engine, micro)

    def policy(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """Of each token of the batch, float32; 0 where it is not trained, or not in ``rows``."""
        return self._score(batch, rows, self.forward)

    def reference(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """As ``policy``, under the reference."""
        engine = self._reference or self._engine
        adapter = contextlib.nullcontext() if self._reference else self._engine.disable_adapter()
        with adapter:
            scores = self._score(batch, rows, lambda micro: _forward(engine, micro))
        engine.reshard()
        return scores

    def _score(
        self, batch: Batch, rows: np.ndarray, forward: Callable[[TensorDict], dict[str, torch.Tensor]]
    ) -> np.ndarray:
        """Each rank computes its rows; every rank gets them all."""
        scores = np.zeros(len(batch.token_ids), np.float32)
        parts = assign_rows(rows, batch.lengths, self._world_size, self._settings.micro_batch_tokens)
        for part in parts[self._rank]:
            logprobs = forward(pad_rows(batch, part, {}))["log_probs"].cpu().numpy()
            for line, row in enumerate(part):
                first, end = batch.offsets[row], batch.offsets[row + 1]
                scores[first + 1 : end] = logprobs[line, : end - first - 1]
        device = next(self._engine.module.parameters()).device
        shared = torch.from_numpy(scores).to(device)
        dist.all_reduce(shared)  # a token has a value on one rank, and 0 on the others
        return shared.cpu().numpy()


def _forward(engine: PaddedEngine, micro: TensorDict) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        _, output = engine.forward_step(micro, None, forward_only=True)
    scores: dict[str, torch.Tensor] = output["model_output"]
    return scores
