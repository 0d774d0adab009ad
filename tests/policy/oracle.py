"""A second, independent policy update: plain PyTorch on one process, written from the formulas.

AdamW, GRPO advantages (one reward a rollout, sample standard deviation, epsilon 1e-6) and the clipped loss
with its dual clip at 3, averaged over the trained tokens of a minibatch. Rows are run one by one, unpadded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_ray.policy.settings import UpdateSettings

VOCABULARY = 128
torch.set_num_threads(1)


def write_tiny_model(folder: Path) -> None:
    """A random Qwen3 with a tied head; wide initial weights, so that its distributions are not flat."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"stands for": "a tokenizer"}')


def load(folder: Path) -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def token_logprobs(model: Qwen3ForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """log p of the tokens after the first."""
    ids = torch.tensor([token_ids])
    scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(-1, ids[0, 1:, None])[:, 0]


def make_batch(model: Qwen3ForCausalLM, groups: int = 4, size: int = 4, seed: int = 0) -> pa.Table:
    """Rollouts of one to three rows, with tool tokens between sampled ones, and logprobs unlike the model's.

    Off by up to 0.5 nats, so that some ratios are clipped on either side.
    """
    draw = np.random.default_rng(seed)
    rows: dict[str, list] = {name: [] for name in ("rollout_id", "group_id", "reward", "weight_versions")}
    rows |= {"token_ids": [], "mask": [], "logprobs": []}
    for rollout in range(groups * size):
        reward = float(draw.random() < 0.5) + 0.25 * (rollout % 2)
        for _ in range(int(draw.integers(1, 4))):
            length = int(draw.integers(6, 30))
            token_ids = draw.integers(0, VOCABULARY, length).tolist()
            mask = (draw.random(length) < 0.5).astype(np.int8)
            mask[0], mask[-1] = 0, 1
            with torch.no_grad():
                logprobs = token_logprobs(model, token_ids).numpy() + draw.uniform(-0.5, 0.5, length - 1)
            rows["rollout_id"].append(f"r{rollout}")
            rows["group_id"].append(f"g{rollout // size}")
            rows["reward"].append(reward)
            rows["token_ids"].append(token_ids)
            rows["mask"].append(mask.tolist())
            rows["logprobs"].append((np.concatenate([[0.0], logprobs]) * mask).tolist())
            rows["weight_versions"].append(np.where(mask, 0, -1).tolist())
    return batch_table(rows)


def batch_table(rows: dict[str, list]) -> pa.Table:
    types = {
        "rollout_id": pa.string(),
        "group_id": pa.string(),
        "reward": pa.float32(),
        "token_ids": pa.list_(pa.int32()),
        "mask": pa.list_(pa.int8()),
        "logprobs": pa.list_(pa.float32()),
        "weight_versions": pa.list_(pa.int32()),
        "step_rewards": pa.list_(pa.float32()),
    }
    return pa.table({name: pa.array(rows[name], kind) for name, kind in types.items() if name in rows})


def grpo_advantages(table: pa.Table) -> dict[str, float]:
    """Of each rollout: its reward against the mean and deviation of its group's rollouts."""
    reward = dict(zip(table["rollout_id"].to_pylist(), table["reward"].to_pylist(), strict=True))
    group = dict(zip(table["rollout_id"].to_pylist(), table["group_id"].to_pylist(), strict=True))
    advantages = {}
    for rollout in reward:
        members = np.array([reward[other] for other in reward if group[other] == group[rollout]])
        advantages[rollout] = (reward[rollout] - members.mean()) / (members.std(ddof=1) + 1e-6)
    return advantages


class PlainTrainer:
    """One minibatch a batch; the same warm-up, clipping and optimizer as the settings ask for."""

    def __init__(self, folder: Path, settings: UpdateSettings) -> None:
        self.settings = settings
        self.model = load(folder)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.steps = 0

    def update(self, table: pa.Table) -> dict[str, float]:
        advantages = grpo_advantages(table)
        tokens = sum(sum(mask) for mask in table["mask"].to_pylist())
        self.optimizer.zero_grad()
        total = 0.0
        for row in table.to_pylist():
            loss = self._row_loss(row, advantages[row["rollout_id"]]) / tokens
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        warm = min(1.0, self.steps / max(self.settings.warmup_steps, 1))
        if self.settings.warmup_steps == 0:
            warm = 1.0
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * warm
        self.optimizer.step()
        self.steps += 1
        return {"loss": total, "grad_norm": float(norm)}

    def _row_loss(self, row: dict, advantage: float) -> torch.Tensor:
        """Sum over the row's trained tokens."""
        new = token_logprobs(self.model, row["token_ids"])
        ratio = (new - torch.tensor(row["logprobs"][1:])).exp()
        clipped = ratio.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        losses = torch.maximum(-advantage * ratio, -advantage * clipped)
        if advantage < 0:
            losses = torch.minimum(losses, torch.full_like(losses, -advantage * 3.0))
        return losses[torch.tensor(row["mask"][1:]) == 1].sum()
