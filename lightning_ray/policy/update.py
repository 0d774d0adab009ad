"""The policy update: a batch of trajectories in, better weights out.

One object a rank. Its methods are collective: every rank calls them in one order with the same arguments,
holds the whole batch, and computes its part of the plan.
Invariant: the result depends neither on the number of ranks nor on micro batches, and only tokens with mask 1
are trained. Processes, deadlines and weight transfer are left to others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from tensordict import TensorDict

from lightning_ray.policy.aggregation import row_weights
from lightning_ray.policy.batch import Batch, read_batch
from lightning_ray.policy.figures import update_figures
from lightning_ray.policy.loaded import write_canaries
from lightning_ray.policy.micro_batch import LogprobGap, Minibatch, pad_rows
from lightning_ray.policy.model_folder import check_model_folder, vocabulary_of
from lightning_ray.policy.plan import alike, assign_rows, split_rollouts
from lightning_ray.policy.proof import canary_prompts
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.staleness import staleness
from lightning_ray.policy.verl_backend import choose_platform

if TYPE_CHECKING:
    from lightning_ray.policy.prepare import Prepared


class PolicyUpdater:
    """One rank of the policy under training."""

    def __init__(
        self,
        settings: UpdateSettings,
        rank: int = 0,
        world_size: int = 1,
        master_address: str = "127.0.0.1",
        master_port: int = 0,
    ) -> None:
        """Load the model and shard it over ``world_size`` ranks that meet at the master's address and port.

        A single rank may leave address and port as they are. Raises ConfigError for an unusable model folder
        before verl is imported.
        """
        check_model_folder(settings.model_path)
        if settings.reference.coefficient and settings.reference.model is not None:
            check_model_folder(settings.reference.model, "reference.model")
        choose_platform(settings.device)
        from lightning_ray.policy.scoring import Scorer
        from lightning_ray.policy.verl_backend import engine, registries

        registries.check_names()
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.updates = 0
        torch.manual_seed(settings.seed)
        engine.join_ranks(rank, world_size, master_address, master_port)
        self._engine = engine.build_engine(settings)
        self._scorer = Scorer(settings, self._engine, rank, world_size)

    def update(self, table: pa.Table, version: int | None = None) -> dict[str, float]:
        """Train on a batch (one row a trajectory) and return what happened, the same on every rank.

        ``version`` is that of the weights about to be trained, by default the number of updates so far; see
        ``update_figures`` and ``staleness`` for what is returned. Further ``trained_tokens``, ``trained_rollouts``, and
        of these ``lone_rollouts``, of which no other of their group is in the batch.

        Raises ValueError for a malformed batch and DivergedError for a loss that is not finite.
        """
        from lightning_ray.policy.prepare import prepare

        batch = read_batch(table)
        with self._engine.train_mode():
            prepared = prepare(self.settings, batch, self._scorer, version)
            result = self._train(batch, prepared)
        self._leave_memory()
        groups = batch.group[prepared.rollouts]
        result |= staleness(batch, self.updates if version is None else version)
        self.updates += 1
        return result | {
            "trained_tokens": float(batch.mask.sum()),
            "trained_rollouts": float(len(groups)),
            "lone_rollouts": float((np.bincount(groups) == 1).sum()),
        }

    def _train(self, batch: Batch, prepared: Prepared) -> dict[str, float]:
        """Step once for each minibatch of each epoch, and sum up what the steps measured."""
        from lightning_ray.policy.step import optimizer_step

        settings = self.settings
        generator = np.random.default_rng([settings.seed, self.updates])
        epochs = [
            split_rollouts(prepared.rollouts, settings.minibatch_rollouts, generator) for _ in range(settings.epochs)
        ]
        first = self._minibatch(batch, prepared, epochs[0][0])
        gap = LogprobGap() if settings.check_logprobs and "max_logprob_diff" not in prepared.figures else None
        if gap is not None:
            # The first minibatch's own forward pass serves for its tokens.
            for rollouts in epochs[0][1:]:
                for micro in self._minibatch(batch, prepared, rollouts).micro_batches:
                    gap.add(self._scorer.forward(micro)["log_probs"], micro)
        steps, tokens = [], []
        for index, rollouts in enumerate(rollouts for epoch in epochs for rollouts in epoch):
            minibatch = self._minibatch(batch, prepared, rollouts) if index else first
            watched = None if index else gap
            steps.append(optimizer_step(settings, self._engine, minibatch, self.world_size, watched, self.updates + 1))
            tokens.append(minibatch.tokens)
        device = next(self._engine.module.parameters()).device
        return update_figures(steps, tokens) | prepared.figures | (gap.over_ranks(device) if gap is not None else {})

    def _minibatch(self, batch: Batch, prepared: Prepared, rollouts: np.ndarray) -> Minibatch:
        settings = self.settings
        rows = np.flatnonzero(np.isin(batch.row_rollout, rollouts))
        weight = np.zeros(len(batch.lengths))
        weight[rows] = row_weights(batch, rows, settings.loss_aggregation, settings.loss_horizon)
        columns = prepared.columns | {"weight": np.repeat(weight, batch.lengths)}
        parts = assign_rows(rows, batch.lengths, self.world_size, settings.micro_batch_tokens)
        return Minibatch(
            micro_batches=[pad_rows(batch, part, columns) for part in parts[self.rank]],
            tokens=int(batch.trained_per_row()[rows].sum()),
        )

    def logprobs(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """log p(token t | tokens before t), in nats at temperature 1: float32, t from 1 on.

        Every rank computes, and returns, all of them.
        """
        found: dict[int, np.ndarray] = {}
        with self._engine.eval_mode():
            for places in alike([len(sequence) for sequence in sequences], self.settings.micro_batch_tokens):
                token_ids = torch.tensor([sequences[place] for place in places], dtype=torch.int64)
                wanted = torch.ones((len(places), token_ids.shape[1] - 1), dtype=torch.bool)
                micro = TensorDict({"token_ids": token_ids, "wanted": wanted}, batch_size=len(places))
                found |= zip(places, self._scorer.forward(micro)["log_probs"].cpu().numpy(), strict=True)
        self._engine.reshard()
        self._leave_memory()
        return [found[place] for place in range(len(sequences))]

    def _leave_memory(self) -> None:
        """On a shared GPU: give back what PyTorch keeps for later, which the engine needs now."""
        if self.settings.device == "cuda" and self.settings.gpu_share < 1:
            torch.cuda.empty_cache()

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors under their Hugging Face names, one after the other; a tied head is not repeated, and a LoRA
        adapter is merged into its base.

        Every rank must exhaust the iterator. A tensor may share memory with the weights: use it before the
        next update.
        """
        from lightning_ray.policy.verl_backend.export import whole_weights

        return whole_weights(self._engine)

    def named_adapter(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The LoRA adapter's whole tensors under PEFT's names; none without LoRA. To be exhausted by every rank."""
        from lightning_ray.policy.verl_backend.export import adapter_weights

        return adapter_weights(self._engine)

    def save(self, folder: str) -> None:
        """Write the model, or its LoRA adapter, and the state of its training (``checkpoint.save``), with canaries by
        which a replica that loads the folder is proved (``loaded``).
        """
        from lightning_ray.policy import checkpoint

        checkpoint.save(self._engine, self.settings, folder, self.updates)
        prompts = canary_prompts(vocabulary_of(Path(self.settings.model_path)))
        logprobs = self.logprobs(prompts)
        if self.rank == 0:
            write_canaries(Path(folder), prompts, [[float(x) for x in row] for row in logprobs])

    def load(self, folder: str) -> None:
        """Go on where ``save`` wrote the folder; see ``checkpoint.load``."""
        from lightning_ray.policy import checkpoint

        self.updates = checkpoint.load(self._engine, self.settings, folder)

    def close(self) -> None:
        """Leave the process group; the object is of no use afterwards."""
        dist.destroy_process_group()
