"""Losses without a reward, against formulas by hand: the likelihood of what was sampled, and a teacher's advantage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("verl")

from tests.policy import formulas as by_hand
from tests.policy.formulas import Row, clipped, rows_of
from tests.policy.oracle import load
from tests.policy.ranks import Ranks, assert_gradients, settings_for

AT_ONCE = {"minibatch_rollouts": 1000, "gradient_clip": 1e9, "warmup_steps": 0, "micro_batch_tokens": 300}


def with_teacher(table: pa.Table, other: Path) -> pa.Table:
    """The log probabilities of another model beside the batch's."""
    model = load(other)
    with torch.no_grad():
        told = [[0.0, *by_hand.token_logprobs(model, ids).tolist()] for ids in table["token_ids"].to_pylist()]
    return table.append_column("teacher_logprobs", pa.array(told, pa.list_(pa.float32())))


def check(ranks: Ranks, model: torch.nn.Module, expected: torch.Tensor, result: dict[str, float]) -> None:
    """Loss and the gradient of every weight."""
    expected.backward()
    assert result["loss"] == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    assert_gradients(ranks, model)


@pytest.mark.parametrize(
    ("aggregation", "total"), [("token-mean", by_hand.mean_over_tokens), ("rollout-mean", by_hand.mean_over_rollouts)]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_likelihood_of_what_was_sampled(
    ranks: Ranks, folder: Path, table: pa.Table, aggregation: str, total: by_hand.Total, world_size: int
) -> None:
    model = load(folder)
    rows = rows_of(table, model)
    settings = settings_for(folder, objective="likelihood", loss_aggregation=aggregation, **AT_ONCE)
    ranks.build(settings, world_size)
    unread = {"weight_versions", "reward"}  # neither rewards nor versions have a part in it
    others = table.drop_columns(list(unread)).append_column("reward", pa.nulls(len(table), pa.float32()).fill_null(7))
    result = ranks.call("update", others)
    tokens = torch.cat([row.new for row in rows]).detach()
    assert result["nll"] == pytest.approx(float(-tokens.mean()), rel=1e-5)
    assert "approx_kl" not in result and "clip_share" not in result and "staleness_mean" not in result
    check(ranks, model, total(rows, [-row.new for row in rows]), result)


def test_the_likelihood_rises_where_it_is_trained(ranks: Ranks, folder: Path, table: pa.Table) -> None:
    ranks.build(settings_for(folder, objective="likelihood", minibatch_rollouts=4, epochs=3, warmup_steps=0), 2)
    told = [ranks.call("update", table) for _ in range(3)]
    losses = [each["nll"] for each in told]
    assert losses[0] > losses[1] > losses[2] and told[0]["steps"] == 12


@pytest.mark.parametrize("reward_weight", [0.0, 0.5])
def test_a_teachers_advantage_is_its_lead_on_each_token(
    ranks: Ranks, folder: Path, table: pa.Table, tmp_path: Path, reward_weight: float
) -> None:
    other = tmp_path / "teacher"
    shifted = load(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in shifted.parameters():
            weight += 0.02 * torch.randn_like(weight)
    shifted.save_pretrained(other)
    model = load(folder)
    rows = rows_of(table, model, load(other))  # its log probabilities are each row's ``reference``
    given = by_hand.spread(rows, by_hand.group_relative(table, by_std=True))
    advantages = [reward_weight * a + 2 * (row.reference - row.old) for row, a in zip(rows, given, strict=True)]
    ranks.build(settings_for(folder, teacher_weight=2.0, reward_weight=reward_weight, **AT_ONCE))
    result = ranks.call("update", with_teacher(table, other))
    divergence = torch.cat([row.old - row.reference for row in rows]).mean()
    assert result["teacher_kl"] == pytest.approx(float(divergence), rel=1e-4, abs=1e-6)
    losses = [dual_clipped(row, advantage) for row, advantage in zip(rows, advantages, strict=True)]
    check(ranks, model, by_hand.mean_over_tokens(rows, losses), result)


def dual_clipped(row: Row, advantage: torch.Tensor) -> torch.Tensor:
    """PPO's clip, and verl's bound of 3 where the advantage is negative."""
    loss = clipped(0.2, 0.28)(row, advantage)
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * 3.0), loss)


def test_a_batch_without_its_teacher_is_refused(ranks: Ranks, folder: Path, table: pa.Table) -> None:
    ranks.build(settings_for(folder, teacher_weight=1.0))
    before = ranks.weights()
    with pytest.raises(ValueError, match="teacher_weight needs the column 'teacher_logprobs'"):
        ranks.call("update", table)
    np.testing.assert_equal(ranks.weights(), before)
