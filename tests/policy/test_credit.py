"""Step credit, loss weights, staleness and schedule: small arithmetic, against hand-written examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lightning_ray.policy.aggregation import row_weights
from lightning_ray.policy.batch import Batch, read_batch
from lightning_ray.policy.credit import step_advantages
from lightning_ray.policy.schedule import rate_share
from lightning_ray.policy.settings import OptimizerSettings
from lightning_ray.policy.staleness import staleness
from lightning_ray.policy.trained_tokens import trained_tokens
from tests.policy.oracle import batch_table


def batch_of(rows: list[tuple[str, str, list[int], list[float]]]) -> Batch:
    """Rows of rollout, group, mask and step rewards; every token was sampled by version 3."""
    masks = [mask for _, _, mask, _ in rows]
    table = batch_table(
        {
            "rollout_id": [rollout for rollout, _, _, _ in rows],
            "group_id": [group for _, group, _, _ in rows],
            "reward": [0.0] * len(rows),
            "token_ids": [list(range(len(mask))) for mask in masks],
            "mask": masks,
            "logprobs": [[0.0] * len(mask) for mask in masks],
            "weight_versions": [[3 if sampled else -1 for sampled in mask] for mask in masks],
            "step_rewards": [steps for _, _, _, steps in rows],
        }
    )
    return read_batch(table)


TWO_CALLS = batch_of(
    [
        ("a", "g", [0, 1, 1, 0, 1], [0, 0, 1, 0, 4]),
        ("b", "g", [0, 1, 0, 0, 1], [0, 0, 0, 0, 2]),
        ("a", "g", [0, 1, 1], [0, 0, 3]),
    ]
)
"""Rollout a has steps of 1 and 4, then in another row 3; b has 0 and 2."""


@pytest.mark.parametrize("by_std", [True, False])
def test_a_token_is_credited_with_the_steps_that_end_at_or_after_it(by_std: bool) -> None:
    tokens = trained_tokens(TWO_CALLS, np.array([0, 1]))
    steps = np.array([1.0, 4.0, 3.0, 0.0, 2.0])
    one, four, three, zero, two = (steps - steps.mean()) / (steps.std(ddof=1) if by_std else 1.0)
    expected = [
        [one + four + three, one + four + three, four + three, three, three],
        [zero + two, two, 0, 0, 0],
    ]
    matrix = step_advantages(TWO_CALLS, tokens, np.array([0, 0]), by_std)
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    flat = tokens.scatter(matrix, len(TWO_CALLS.token_ids))
    np.testing.assert_allclose(flat[TWO_CALLS.mask == 0], 0)
    np.testing.assert_allclose(flat[-2:], [three, three], atol=1e-5)


def test_groups_are_normalised_apart_and_a_lone_step_teaches_nothing() -> None:
    batch = batch_of([("a", "g", [0, 1], [0, 5.0]), ("b", "h", [0, 1, 0, 1], [0, 1.0, 0, 3.0])])
    matrix = step_advantages(batch, trained_tokens(batch, np.array([0, 1])), np.array([0, 1]), True)
    np.testing.assert_allclose(matrix, [[0, 0], [0, 1 / np.sqrt(2)]], atol=1e-5)


def test_step_credit_without_step_rewards_is_told() -> None:
    table = batch_table(
        {
            name: [["a"], ["g"], [0.0], [[1, 2]], [[0, 1]], [[0.0, 0.0]], [[0, 0]]][index]
            for index, name in enumerate(
                ("rollout_id", "group_id", "reward", "token_ids", "mask", "logprobs", "weight_versions")
            )
        }
    )
    batch = read_batch(table)
    with pytest.raises(ValueError, match="needs the column 'step_rewards'"):
        step_advantages(batch, trained_tokens(batch, np.array([0])), np.array([0]), True)


def test_a_rollout_weighs_one_in_however_many_rows() -> None:
    rows = np.arange(3)  # of a, b and a again: 3, 2 and 2 trained tokens
    weights = {
        "token-mean": [1 / 7] * 3,
        "token-sum": [1] * 3,
        "rollout-mean": [1 / 10, 1 / 4, 1 / 10],
        "rollout-sum": [1 / 2] * 3,
        "rollout-sum-norm": [1 / 128] * 3,
        "seq-mean-token-mean": [1 / 9, 1 / 6, 1 / 6],
        "seq-mean-token-sum": [1 / 3] * 3,
        "seq-mean-token-sum-norm": [1 / 192] * 3,
    }
    for name, expected in weights.items():
        horizon = 64 if name.endswith("norm") else None
        np.testing.assert_allclose(row_weights(TWO_CALLS, rows, name, horizon), expected)  # type: ignore[arg-type]


def test_an_empty_rollout_counts_nowhere() -> None:
    batch = batch_of([("a", "g", [0, 1, 1], [0, 0, 1]), ("b", "g", [0, 0, 0], [0, 0, 0])])
    for name in ("token-mean", "rollout-mean", "seq-mean-token-mean"):
        assert row_weights(batch, np.arange(2), name, None)[0] == 0.5  # type: ignore[arg-type]


def test_staleness_is_of_trained_tokens() -> None:
    batch = batch_of([("a", "g", [0, 1, 1, 1], [0, 0, 0, 1])])
    figures = staleness(replace(batch, weight_versions=np.array([-1, 1, 3, 3])), 4)
    expected = {"staleness_1": 2 / 3, "staleness_3": 1 / 3, "staleness_mean": 5 / 3, "staleness_max": 3}
    assert figures == pytest.approx(expected)
    assert staleness(replace(batch, weight_versions=None), 4) == {}


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("cosine", [0, 0.5, 1, 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 0.55, 0.1 + 0.9 * (1 - 0.5**0.5) / 2, 0.1, 0.1]),
    ],
)
def test_the_rate_warms_up_falls_and_stays(schedule: str, shares: list[float]) -> None:
    settings = OptimizerSettings(
        learning_rate=2e-3,
        end_learning_rate=2e-4,
        schedule=schedule,
        warmup_steps=2,
        schedule_steps=6,  # type: ignore[arg-type]
    )
    assert [rate_share(settings, step) for step in range(8)] == pytest.approx(shares)
    without = settings.model_copy(update={"warmup_steps": 0})
    assert rate_share(without, 0) == 1
