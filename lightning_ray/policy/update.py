"""The policy update: a batch of trajectories in, better weights out.

One object a rank. Its methods are collective: every rank calls them in one order with the same arguments,
holds the whole batch, and computes its part of the plan.
Invariant: the result depends neither on the number of ranks nor on micro batches, and only tokens with mask 1
are trained. Behaviour log probabilities are the engine's, as sampled; ratios are taken against them.
Processes, deadlines and weight transfer are left to others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from tensordict import TensorDict

from lightning_ray.policy.batch import Batch, read_batch
from lightning_ray.policy.micro_batch import LogprobGap, Minibatch, pad_rows
from lightning_ray.policy.model_folder import (
    STATE,
    check_model_folder,
    copy_description,
    read_progress,
    write_progress,
)
from lightning_ray.policy.plan import assign_rows, split_rollouts
from lightning_ray.policy.settings import DivergedError, UpdateSettings
from lightning_ray.policy.verl_backend import choose_platform

MEASURED = ("loss", "clipped", "kl", "entropy")
PER_TOKEN = {"clip_share": "clipped", "approx_kl": "kl", "entropy": "entropy"}


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
        choose_platform(settings.device)
        from lightning_ray.policy.verl_backend import algos, engine

        algos.check_names()
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.updates = 0
        self._algos = algos
        torch.manual_seed(settings.seed)
        engine.join_ranks(rank, world_size, master_address, master_port)
        self._engine = engine.build_engine(settings)
        self._device = next(self._engine.module.parameters()).device

    def update(self, table: pa.Table) -> dict[str, float]:
        """Train on a batch (one row a trajectory) and return what happened, the same on every rank.

        ``loss`` and ``grad_norm`` (before clipping) are means over the optimizer steps; ``clip_share``,
        ``approx_kl`` (engine against trainer, nats) and ``entropy`` (nats) over the trained tokens;
        ``learning_rate`` is that of the last step. Further ``steps``, ``trained_tokens``,
        ``trained_rollouts``; ``lone_rollouts``, left out because no other of their group is in the batch;
        and, unless switched off, ``max_logprob_diff`` and ``mean_logprob_diff`` between trainer and engine
        before the first step, over all trained tokens.

        Raises ValueError for a malformed batch and DivergedError for a loss that is not finite.
        """
        batch = read_batch(table)
        trained = batch.trained_per_rollout()
        keep = trained > 0
        if self._algos.needs_group(self.settings):
            keep &= np.bincount(batch.group[keep], minlength=len(keep))[batch.group] > 1
        if not keep.any():
            raise ValueError("no rollout of the batch can be trained: each is empty or alone in its group")
        advantage = np.zeros(len(keep), dtype=np.float32)
        advantage[keep] = self._algos.rollout_advantages(
            self.settings, batch.reward[keep], batch.group[keep], trained[keep]
        )
        generator = np.random.default_rng([self.settings.seed, self.updates])
        epochs = [
            [self._minibatch(batch, advantage, rollouts) for rollouts in minibatches]
            for minibatches in (
                split_rollouts(np.flatnonzero(keep), self.settings.minibatch_rollouts, generator)
                for _ in range(self.settings.epochs)
            )
        ]
        result = self._train(epochs)
        self.updates += 1
        return result | {
            "trained_tokens": float(trained[keep].sum()),
            "trained_rollouts": float(keep.sum()),
            "lone_rollouts": float((~keep & (trained > 0)).sum()),
        }

    def _minibatch(self, batch: Batch, advantage: np.ndarray, rollouts: np.ndarray) -> Minibatch:
        rows = np.flatnonzero(np.isin(batch.row_rollout, rollouts))
        parts = assign_rows(rows, batch.lengths, self.world_size, self.settings.micro_batch_tokens)
        trained = batch.trained_per_row()[rows]
        return Minibatch(
            micro_batches=[pad_rows(batch, advantage, part) for part in parts[self.rank]],
            tokens=int(trained.sum()),
            rows=int((trained > 0).sum()),
        )

    def _train(self, epochs: list[list[Minibatch]]) -> dict[str, float]:
        """Step once for each minibatch, and sum up what the steps measured."""
        gap = LogprobGap() if self.settings.check_logprobs else None
        with self._engine.train_mode():
            if gap is not None:
                # The first minibatch's own forward pass serves for its tokens.
                for micro in (micro for minibatch in epochs[0][1:] for micro in minibatch.micro_batches):
                    gap.add(self._forward(micro)["log_probs"], micro)
            minibatches = [minibatch for epoch in epochs for minibatch in epoch]
            steps = [self._step(minibatches[0], gap), *(self._step(each, None) for each in minibatches[1:])]
        tokens = sum(minibatch.tokens for minibatch in minibatches)
        result = {name: sum(step[name] for step in steps) / len(steps) for name in ("loss", "grad_norm")}
        result |= {name: sum(step[what] for step in steps) / tokens for name, what in PER_TOKEN.items()}
        result |= {"learning_rate": steps[-1]["learning_rate"], "steps": float(len(steps))}
        return result | (gap.over_ranks(self._device) if gap is not None else {})

    def _step(self, minibatch: Minibatch, gap: LogprobGap | None) -> dict[str, float]:
        """One optimizer step; ranks exchange gradients at their last micro batch."""
        loss_function = self._algos.minibatch_loss(self.settings, minibatch.tokens, minibatch.rows, self.world_size)
        self._engine.optimizer_zero_grad()
        sums = np.zeros(len(MEASURED))
        for index, micro in enumerate(minibatch.micro_batches):
            self._engine.module.set_requires_gradient_sync(index == len(minibatch.micro_batches) - 1)
            loss, output = self._engine.forward_step(micro, loss_function, forward_only=False)
            loss.backward()
            logprobs = output["model_output"]["log_probs"].cpu()
            sums += [
                output["loss"] / self.world_size,
                output["metrics"]["clipped"],
                float((micro["logprobs"] - logprobs)[micro["wanted"]].sum()),
                float(output["model_output"]["entropy"].sum()),
            ]
            if gap is not None:
                gap.add(logprobs, micro)
        total = torch.tensor(sums, device=self._device)
        dist.all_reduce(total)
        step = dict(zip(MEASURED, total.tolist(), strict=True))
        self._check_finite("loss", step["loss"])
        step["learning_rate"] = self._engine.optimizer.param_groups[0]["lr"]
        step["grad_norm"] = self._engine.optimizer_step()  # verl skips the step if the norm is not finite
        self._check_finite("gradient norm", step["grad_norm"])
        self._engine.lr_scheduler_step()
        return step

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} of update {self.updates + 1} is {value}; this step changed no weight. Lower "
                f"learning_rate (now {self.settings.learning_rate}) and resume from the last checkpoint"
            )

    def _forward(self, micro: TensorDict) -> dict[str, torch.Tensor]:
        """Log probabilities and entropies, without a gradient."""
        with torch.no_grad():
            _, output = self._engine.forward_step(micro, None, forward_only=True)
        return output["model_output"]

    def logprobs(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """log p(token t | tokens before t), in nats at temperature 1: float32, t from 1 on.

        Every rank computes, and returns, all of them.
        """
        results = []
        with self._engine.eval_mode():
            for sequence in sequences:
                token_ids = torch.tensor([sequence], dtype=torch.int64)
                wanted = torch.ones((1, len(sequence) - 1), dtype=torch.bool)
                micro = TensorDict({"token_ids": token_ids, "wanted": wanted}, batch_size=1)
                results.append(self._forward(micro)["log_probs"][0].cpu().numpy())
        self._engine.reshard()
        return results

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors under their Hugging Face names, one after the other; a tied head is not repeated.

        Every rank must exhaust the iterator. A tensor may share memory with the weights: use it before the
        next update.
        """
        module = self._engine.module
        every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        tied = every - {name for name, _ in module.named_parameters()}
        weights, _ = self._engine.get_per_tensor_param()
        yield from ((name, tensor) for name, tensor in weights if name not in tied)

    def save(self, folder: str) -> None:
        """Write the model in Hugging Face format, and the state of its training in ``trainer_state``.

        The folder serves as another run's ``model_path`` and for ``load``.
        """
        from huggingface_hub import save_torch_state_dict

        target = Path(folder)
        (target / STATE).mkdir(parents=True, exist_ok=True)
        weights: dict[str, torch.Tensor] = {}
        for name, tensor in self.named_weights():
            if self.rank == 0:
                full = tensor.detach().cpu()
                # Uneven shards are gathered into a longer buffer, which the file must not hold.
                covers = full.untyped_storage().nbytes() == full.nbytes
                weights[name] = full if covers else full.clone()
        if self.rank == 0:
            copy_description(Path(self.settings.model_path), target)
            save_torch_state_dict(weights, target)
            write_progress(target / STATE, self.updates, self.world_size)
        self._engine.save_checkpoint(str(target / STATE))

    def load(self, folder: str) -> None:
        """Go on where ``save`` wrote the folder: weights, optimizer, schedule and shuffling, bit for bit.

        Raises ConfigError if the folder holds no such state, or that of another number of ranks.
        """
        self.updates = read_progress(Path(folder), self.world_size)
        self._engine.load_checkpoint(str(Path(folder) / STATE), del_local_after_load=False)

    def close(self) -> None:
        """Leave the process group; the object is of no use afterwards."""
        dist.destroy_process_group()
