"""The update against a bare PyTorch loop of the same loss, on one rank of one thread, in CPU time.

Both are handed the same batch of rows and make one optimizer step of it: padding, forward, GRPO's clipped loss,
backward, gradient clipping, AdamW. The loop has neither FSDP nor checks; ours measures what it reports as always.
Windows of the two take turns, in one process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.update import PolicyUpdater


class Size(NamedTuple):
    """A random model and a batch for it."""

    layers: int
    hidden: int
    vocabulary: int
    rollouts: int
    longest: int
    """Tokens of a row, from a quarter of it on."""
    share: float
    """Of the windows that are measured."""


SIZES = {
    "": Size(layers=2, hidden=128, vocabulary=448, rollouts=64, longest=160, share=1),
    "_8m": Size(layers=6, hidden=320, vocabulary=2048, rollouts=16, longest=256, share=1 / 3),
}
"""The example's model, and one of 8 million parameters."""


def measure(windows: int) -> dict[str, float]:
    """Ratios of tokens per CPU second, medians over ``windows`` pairs (fewer for the larger model), and both rates."""
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for suffix, size in SIZES.items():
        with tempfile.TemporaryDirectory(prefix="lr-training-") as folder:
            write_model(Path(folder), size)
            ours, bare = rates(Path(folder), size, round(windows * size.share))
        ratios = [one / other for one, other in zip(ours, bare, strict=True)]
        figures[f"update_tokens_per_cpu_s_ratio{suffix}"] = round(median(ratios), 3)
        figures[f"update_tokens_per_cpu_s{suffix}"] = round(median(ours))
        figures[f"bare_tokens_per_cpu_s{suffix}"] = round(median(bare))
    return figures


def write_model(folder: Path, size: Size) -> None:
    """A random Qwen3."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 2,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        head_dim=32,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_batch(size: Size, seed: int = 0) -> pa.Table:
    """One row a rollout: a prompt of a third, then turns of sampled tokens with a tool's answer between them."""
    draw = np.random.default_rng(seed)
    rows = []
    for rollout in range(size.rollouts):
        length = int(draw.integers(size.longest // 4, size.longest))
        mask = np.arange(length) % 30 >= 10
        mask[: length // 3] = False
        rows.append(
            {
                "rollout_id": f"r{rollout}",
                "group_id": f"g{rollout // 8}",
                "reward": float(draw.random() < 0.5) + rollout % 8 / 100,
                "token_ids": draw.integers(0, size.vocabulary, length).astype(np.int32),
                "mask": mask.astype(np.int8),
                "logprobs": np.where(mask, -np.log(size.vocabulary), 0).astype(np.float32),
            }
        )
    return pa.Table.from_pylist(rows)


def rates(folder: Path, size: Size, windows: int) -> tuple[list[float], list[float]]:
    """Tokens per CPU second of each window: ours, and the loop's."""
    settings = UpdateSettings(model_path=str(folder), warmup_steps=0, learning_rate=1e-5)
    table = make_batch(size)
    updater = PolicyUpdater(settings)
    bare = BareLoop(folder, settings)
    tokens = sum(map(len, table["token_ids"].to_pylist()))
    runs: tuple[Callable[[], float], Callable[[], float]] = (
        lambda: updater.update(table)["loss"],
        lambda: bare.update(table),
    )
    losses = [run() for run in runs]
    if abs(losses[0] - losses[1]) > 1e-4:
        raise RuntimeError(f"the two do not compute the same loss: {losses}")
    measured: tuple[list[float], list[float]] = ([], [])
    for window in range(windows):
        for which in (0, 1) if window % 2 else (1, 0):
            measured[which].append(tokens / cpu_seconds(runs[which]))
    updater.close()
    return measured


def cpu_seconds(run: Callable[[], float]) -> float:
    """Of this process, all threads, for one call: the least of three, as other load only adds."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


class BareLoop:
    """GRPO by hand."""

    def __init__(self, folder: Path, settings: UpdateSettings) -> None:
        self._settings = settings
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def update(self, table: pa.Table) -> float:
        """One step; returns the loss."""
        rows = sorted(table.to_pylist(), key=lambda row: -len(row["token_ids"]))
        advantage = self._advantages(rows)
        trained = sum(sum(row["mask"]) for row in rows)
        self._optimizer.zero_grad()
        total = 0.0
        for micro in self._cut(rows):
            loss = self._loss(micro, advantage) / trained
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.gradient_clip)
        self._optimizer.step()
        return total

    def _advantages(self, rows: list[dict]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for row in rows:
            groups.setdefault(row["group_id"], []).append(row["reward"])
        result = {}
        for row in rows:
            rewards = groups[row["group_id"]]
            result[row["rollout_id"]] = float((row["reward"] - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6))
        return result

    def _cut(self, rows: list[dict]) -> list[list[dict]]:
        micro: list[list[dict]] = []
        for row in rows:
            if micro and (len(micro[-1]) + 1) * len(micro[-1][0]["token_ids"]) <= self._settings.micro_batch_tokens:
                micro[-1].append(row)
            else:
                micro.append([row])
        return micro

    def _loss(self, rows: list[dict], advantage: dict[str, float]) -> torch.Tensor:
        """Summed over the trained tokens."""
        longest = len(rows[0]["token_ids"])
        token_ids, mask = torch.zeros((len(rows), longest), dtype=torch.int64), torch.zeros((len(rows), longest))
        old, weights = torch.zeros_like(mask), torch.zeros_like(mask)
        for line, row in enumerate(rows):
            length = len(row["token_ids"])
            token_ids[line, :length] = torch.tensor(row["token_ids"])
            mask[line, :length] = torch.tensor(row["mask"])
            old[line, :length] = torch.tensor(row["logprobs"])
            weights[line] = advantage[row["rollout_id"]]
        wanted = mask[:, 1:] > 0
        scores = self._model(input_ids=token_ids, use_cache=False).logits[:, :-1][wanted].log_softmax(-1)
        new = scores.gather(-1, token_ids[:, 1:][wanted].unsqueeze(-1)).squeeze(-1)
        ratio, sign = (new - old[:, 1:][wanted]).exp(), weights[:, 1:][wanted]
        clipped = ratio.clamp(1 - self._settings.clip_low, 1 + self._settings.clip_high)
        losses = -torch.minimum(ratio * sign, clipped * sign)
        return torch.where(sign < 0, losses.minimum(-self._settings.dual_clip * sign), losses).sum()
