"""Packed, padded, whole and in pieces: one loss, one gradient norm, the same weights after several steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("verl")

from lightning_ray.policy.batch import read_batch
from lightning_ray.policy.credit import step_advantages
from lightning_ray.policy.trained_tokens import trained_tokens
from tests.policy import formulas as by_hand
from tests.policy.formulas import Row
from tests.policy.oracle import load
from tests.policy.ranks import Ranks, settings_for


@pytest.fixture(scope="module")
def batches(batches: list[pa.Table]) -> list[pa.Table]:
    return [with_steps(table) for table in batches[:3]]


def with_steps(table: pa.Table) -> pa.Table:
    """A reward on the last token of each run of sampled ones."""
    draw = np.random.default_rng(table.num_rows)
    rewards = []
    for mask in table["mask"].to_pylist():
        ends = np.diff([*mask, 0]) == -1
        rewards.append(np.where(ends, draw.integers(0, 3, len(mask)), 0.0).tolist())
    return table.append_column("step_rewards", pa.array(rewards, pa.list_(pa.float32())))


def packed_rows(table: pa.Table, model: torch.nn.Module, reference: torch.nn.Module) -> list[Row]:
    """All rows end to end in one sequence, each seeing itself alone (block-diagonal causal mask)."""
    rows = table.to_pylist()
    ids = torch.tensor([[token for row in rows for token in row["token_ids"]]])
    owner = torch.tensor([index for index, row in enumerate(rows) for _ in row["token_ids"]])
    positions = torch.cat([torch.arange(len(row["token_ids"])) for row in rows])[None]
    sees = (owner[:, None] == owner[None]) & (positions[0][:, None] >= positions[0][None])
    mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[None, None]

    def scores(one: torch.nn.Module) -> torch.Tensor:
        return one(input_ids=ids, position_ids=positions, attention_mask=mask).logits[0].log_softmax(-1)

    new, other = scores(model), scores(reference).detach()
    result, start = [], 0
    for row in rows:
        length = len(row["token_ids"])
        here, next_ids = slice(start, start + length - 1), ids[0, start + 1 : start + length, None]
        trained = torch.tensor(row["mask"][1:]) == 1
        chosen = [each[here].gather(-1, next_ids)[:, 0][trained] for each in (new, other)]
        result.append(Row(row["rollout_id"], chosen[0], torch.tensor(row["logprobs"][1:])[trained], chosen[1]))
        start += length
    return result


CHOICES: list[dict[str, Any]] = [
    {},
    {"loss_aggregation": "rollout-mean", "reference": {"coefficient": 0.3, "estimator": "k3"}},
    {"credit": "step"},
]


def advantages_of(choice: dict[str, Any], table: pa.Table, rows: list[Row]) -> list[torch.Tensor]:
    if choice.get("credit") != "step":
        return by_hand.spread(rows, by_hand.group_relative(table, True))
    batch = read_batch(table)
    tokens = trained_tokens(batch, np.arange(len(batch.reward)))
    flat = tokens.scatter(step_advantages(batch, tokens, batch.group, True), len(batch.token_ids))
    parts = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    return [torch.from_numpy(flat[first:end][batch.mask[first:end] > 0]) for first, end in parts]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_packed_equals_padded_whole_and_in_pieces(
    ranks: Ranks, folder: Path, batches: list[pa.Table], choice: dict[str, Any]
) -> None:
    chosen = settings_for(folder, minibatch_rollouts=1000, warmup_steps=0, **choice)
    model, first = load(folder), load(folder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=chosen.learning_rate, betas=chosen.betas, weight_decay=chosen.weight_decay
    )
    total = by_hand.mean_over_rollouts if "loss_aggregation" in choice else by_hand.mean_over_tokens
    expected = []
    for table in batches:
        rows = packed_rows(table, model, first)
        pairs = zip(rows, advantages_of(choice, table, rows), strict=True)
        losses = [by_hand.clipped(chosen.clip_low, chosen.clip_high)(row, advantage) for row, advantage in pairs]
        apart = [chosen.reference.coefficient * by_hand.k3(row) for row in rows]
        loss = total(rows, losses) + total(rows, apart)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.gradient_clip)
        optimizer.step()
        expected.append((float(loss.detach()), float(norm)))
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    for world_size, tokens in ((1, 100_000), (1, 64), (2, 300)):
        ranks.build(chosen.model_copy(update={"micro_batch_tokens": tokens}), world_size)
        for table, (loss, norm) in zip(batches, expected, strict=True):
            result = ranks.call("update", table)
            assert result["loss"] == pytest.approx(loss, abs=1e-5)
            assert result["grad_norm"] == pytest.approx(norm, rel=1e-4)
        # Adam's first steps are a sign where a gradient is near 0: few weights may differ, and by less than a step.
        for name, weight in ranks.weights().items():
            differs = np.abs(weight - weights[name])
            assert differs.max() < 0.5 * chosen.learning_rate and differs.mean() < 1e-7, name


def test_the_schedule_reaches_the_optimizer(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    chosen = settings_for(folder, schedule="linear", schedule_steps=4, warmup_steps=1, end_learning_rate=1e-4)
    ranks.build(chosen)
    rates = [ranks.call("update", table)["learning_rate"] for table in batches]
    assert rates == pytest.approx([0, 1e-3, 7e-4])


def test_bfloat16_is_of_the_passes_and_not_of_the_weights(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    """What CUDA does by default, on the CPU."""
    results, moved = [], []
    for dtype in ("float32", "bfloat16"):
        before = ranks.build(settings_for(folder, warmup_steps=0, dtype=dtype), 2).weights()
        results.append(ranks.call("update", batches[0]))
        after = ranks.weights()
        assert all(weight.dtype == np.float32 for weight in after.values())
        moved.append(np.concatenate([(after[name] - before[name]).ravel() for name in before]))
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], abs=2e-2)
    assert results[1]["loss"] != results[0]["loss"]
    assert np.corrcoef(*moved)[0, 1] > 0.9
