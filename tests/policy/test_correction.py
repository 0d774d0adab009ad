"""Off-policy correction and the reference model against formulas written by hand, in loss and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("verl")

from tests.policy import formulas as by_hand
from tests.policy.formulas import Row
from tests.policy.oracle import load
from tests.policy.ranks import Ranks, assert_gradients, settings_for


def one_step(folder: Path, **changes: Any) -> Any:
    return settings_for(
        folder, warmup_steps=0, gradient_clip=1e9, minibatch_rollouts=1000, micro_batch_tokens=200, **changes
    )


def ratio(row: Row) -> torch.Tensor:
    """Trainer over engine before the first step."""
    return row.ratio.detach()


def product(row: Row) -> torch.Tensor:
    return ratio(row).log().sum().exp()


def within(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return ((value >= low) & (value <= high)).float()


def k2(row: Row) -> torch.Tensor:
    return ratio(row).log().square() / 2


def k3(row: Row) -> torch.Tensor:
    return ratio(row) - 1 - ratio(row).log()


CORRECTIONS: list[tuple[dict[str, Any], Any]] = [
    ({"weights": "token", "cap": 1.2}, lambda row: ratio(row).clamp(max=1.2)),
    ({"weights": "sequence", "cap": 1.5}, lambda row: product(row).clamp(max=1.5)),
    ({"weights": "token", "floor": 0.8, "cap": 1.3}, lambda row: ratio(row) * within(ratio(row), 0.8, 1.3)),
    ({"reject": ("token_k1",), "band": (0.9, 1.5)}, lambda row: within(ratio(row), 0.9, 1.5)),
    ({"reject": ("token_k2",), "limit": 0.05}, lambda row: within(k2(row), 0, 0.05)),
    ({"reject": ("token_k3",), "limit": 0.05}, lambda row: within(k3(row), 0, 0.05)),
    ({"reject": ("row_mean_k1",), "band": (0.95, 2.0)}, lambda row: within(ratio(row).log().mean().exp(), 0.95, 2.0)),
    ({"reject": ("row_max_k3",), "limit": 0.1}, lambda row: within(k3(row).max(), 0, 0.1)),
    (
        {"weights": "token", "cap": 1.2, "reject": ("token_k1", "row_mean_k2"), "limit": 0.06},
        lambda row: ratio(row).clamp(max=1.2) * within(ratio(row), 0.5, 2.0) * within(k2(row).mean(), 0, 0.06),
    ),
]


@pytest.mark.parametrize(("correction", "factor"), CORRECTIONS, ids=[str(correction) for correction, _ in CORRECTIONS])
def test_a_correction_multiplies_the_loss_of_decoupled_ppo(
    ranks: Ranks, folder: Path, table: pa.Table, correction: dict[str, Any], factor: Any
) -> None:
    model = load(folder)
    rows = by_hand.rows_of(table, model)
    advantages = by_hand.spread(rows, by_hand.group_relative(table, True))
    # Before the first step the proximal policy is the policy itself: its ratio is 1, with a gradient.
    losses = [
        -(row.new - row.new.detach()).exp() * advantage * factor(row)
        for row, advantage in zip(rows, advantages, strict=True)
    ]
    expected = by_hand.mean_over_tokens(rows, losses)
    expected.backward()
    ranks.build(one_step(folder, old_logprobs="trainer", correction=correction))
    result = ranks.call("update", table)
    assert result["loss"] == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    assert_gradients(ranks, model)
    ratios = torch.cat([ratio(row) for row in rows])
    if correction.get("weights") == "token":
        capped = 1 - within(ratios, correction.get("floor", 0.0), correction["cap"])
        assert result["ratio_mean"] == pytest.approx(float(ratios.mean()), rel=1e-5)
        assert result["ratio_max"] == pytest.approx(float(ratios.max()), rel=1e-5)
        assert result["capped_share"] == pytest.approx(float(capped.mean()))
    elif "reject" in correction:
        rejected = 1 - torch.cat([factor(row).expand_as(row.old) for row in rows])
        assert 0 < result["rejected_share"] < 1
        assert result["rejected_share"] == pytest.approx(float(rejected.mean()))


def test_importance_weights_are_told_without_a_correction(ranks: Ranks, folder: Path, table: pa.Table) -> None:
    ratios = torch.cat([ratio(row) for row in by_hand.rows_of(table, load(folder))])
    for world_size in (1, 2):
        settings = one_step(folder, correction={"cap": 1.2})
        result = ranks.build(settings, world_size).call("update", table)
        assert result["ratio_mean"] == pytest.approx(float(ratios.mean()), rel=1e-5)
        assert result["ratio_max"] == pytest.approx(float(ratios.max()), rel=1e-5)
        assert 0 < result["capped_share"] == pytest.approx(float((ratios > 1.2).float().mean()))
        assert result["rejected_share"] == 0


def test_without_a_ratio_the_weights_are_of_the_present_policy(ranks: Ranks, folder: Path, table: pa.Table) -> None:
    model = load(folder)
    rows = by_hand.rows_of(table, model)
    advantages = by_hand.spread(rows, by_hand.group_relative(table, True))
    losses = [
        by_hand.log_probability(row, advantage) * ratio(row).clamp(max=1.1)
        for row, advantage in zip(rows, advantages, strict=True)
    ]
    expected = by_hand.mean_over_tokens(rows, losses)
    expected.backward()
    ranks.build(one_step(folder, loss="gpg", correction={"weights": "token", "cap": 1.1}))
    assert ranks.call("update", table)["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_gradients(ranks, model)


def test_the_trainers_old_logprobs_are_of_before_the_first_step(ranks: Ranks, folder: Path, table: pa.Table) -> None:
    settings = settings_for(folder, warmup_steps=0, old_logprobs="trainer", epochs=2, minibatch_rollouts=1000)
    result = ranks.build(settings).call("update", table)
    rows = by_hand.rows_of(table, load(folder))
    gaps = torch.cat([(row.new - row.old).detach().abs() for row in rows])
    assert result["max_logprob_diff"] == pytest.approx(float(gaps.max()), abs=1e-5)
    assert result["mean_logprob_diff"] == pytest.approx(float(gaps.mean()), abs=1e-5)
    on_policy = ranks.build(settings.model_copy(update={"epochs": 1})).call("update", table)
    assert on_policy["clip_share"] == 0
    assert on_policy["loss"] != result["loss"]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_from_the_reference_is_a_term_of_the_loss(
    ranks: Ranks, folder: Path, table: pa.Table, tmp_path: Path, estimator: str
) -> None:
    torch.manual_seed(1)
    other = load(folder)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn_like(weight)
    other.save_pretrained(tmp_path)
    model = load(folder)
    rows = by_hand.rows_of(table, model, other)
    estimates = {
        "k1": [row.new - row.reference for row in rows],
        "k2": [(row.new - row.reference).square() / 2 for row in rows],
        "k3": [by_hand.k3(row) for row in rows],
    }[estimator]
    advantages = by_hand.spread(rows, by_hand.group_relative(table, True))
    clip = by_hand.clipped(0.2, 0.28)
    policy = [clip(row, advantage) for row, advantage in zip(rows, advantages, strict=True)]
    expected = by_hand.mean_over_tokens(rows, policy) + 0.5 * by_hand.mean_over_tokens(rows, estimates)
    expected.backward()
    reference = {"coefficient": 0.5, "estimator": estimator, "model": str(tmp_path)}
    ranks.build(one_step(folder, reference=reference))
    result = ranks.call("update", table)
    assert result["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert result["reference_kl"] == pytest.approx(float(torch.cat(estimates).mean().detach()), rel=1e-4)
    assert_gradients(ranks, model)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_reference_stays_where_training_began(ranks: Ranks, folder: Path, table: pa.Table, place: str) -> None:
    reference = {"coefficient": 0.1, "estimator": "k2", "place": place}
    ranks.build(one_step(folder, reference=reference), 2)
    assert ranks.call("update", table)["reference_kl"] == pytest.approx(0, abs=1e-9)
    assert ranks.call("update", table)["reference_kl"] > 1e-4


def test_entropy_is_rewarded(ranks: Ranks, folder: Path, table: pa.Table) -> None:
    bonus = ranks.build(one_step(folder, entropy_bonus=0.5)).call("update", table)
    with_bonus = ranks.gradients()
    plain = ranks.build(one_step(folder)).call("update", table)
    without = ranks.gradients()
    assert bonus["loss"] == pytest.approx(plain["loss"] - 0.5 * plain["entropy"], abs=1e-5)
    model = load(folder)
    total, tokens = torch.zeros(()), 0
    for row in table.to_pylist():
        scores = model(input_ids=torch.tensor([row["token_ids"]])).logits[0, :-1].log_softmax(-1)
        trained = torch.tensor(row["mask"][1:]) == 1
        total = total - (scores.exp() * scores).sum(-1)[trained].sum()
        tokens += int(trained.sum())
    (-0.5 * total / tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(with_bonus[name] - without[name], parameter.grad.numpy(), atol=2e-5)
