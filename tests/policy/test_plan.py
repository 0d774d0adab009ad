"""The plan of an update: what every rank must agree on."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from lightning_ray.policy.plan import alike, assign_rows, split_rollouts
from lightning_ray.policy.settings import UpdateSettings


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_each_row_is_computed_once_and_ranks_stay_in_step(ranks: int, count: int) -> None:
    lengths = np.random.default_rng(count).integers(2, 90, count)
    rows = np.arange(0, count, 2)
    parts = assign_rows(rows, lengths, ranks, max_tokens=256)
    assert sorted(row for part in parts for micro in part for row in micro) == rows.tolist()
    assert len({len(part) for part in parts}) == 1
    for micro in (micro for part in parts for micro in part if len(micro)):
        assert len(micro) * lengths[micro].max() <= 256


def test_ranks_are_balanced_and_padding_is_small() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 256)
    parts = assign_rows(np.arange(256), lengths, 2, max_tokens=2048)
    tokens = [sum(lengths[micro].sum() for micro in part) for part in parts]
    assert max(tokens) - min(tokens) <= lengths.max()
    padded = sum(len(micro) * lengths[micro].max() for part in parts for micro in part if len(micro))
    assert padded < 1.2 * lengths.sum()


def test_a_row_longer_than_a_micro_batch_goes_alone() -> None:
    parts = assign_rows(np.arange(3), np.array([5, 300, 5]), 1, max_tokens=100)
    assert [micro.tolist() for micro in parts[0]] == [[1], [0, 2]]


def test_minibatches_are_few_equal_and_reproducible() -> None:
    splits = [split_rollouts(np.arange(130), 64, np.random.default_rng([7, 1])) for _ in range(2)]
    assert [len(part) for part in splits[0]] == [44, 43, 43]
    assert sorted(np.concatenate(splits[0])) == list(range(130))
    np.testing.assert_equal(splits[0], splits[1])


def test_settings_explain_themselves() -> None:
    with pytest.raises(ValidationError, match="loss_horizon belongs to"):
        UpdateSettings(model_path="m", loss_aggregation="seq-mean-token-sum-norm")
    with pytest.raises(ValidationError, match="learning_rat"):
        UpdateSettings(model_path="m", learning_rat=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("lengths", "most", "found"),
    [
        ([], 10, []),
        ([5, 5], 10, [[0, 1]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([5, 3, 5, 3], 100, [[0, 2], [1, 3]]),
        ([50, 50], 10, [[0], [1]]),
    ],
)
def test_sequences_of_one_length_go_together(lengths: list[int], most: int, found: list[list[int]]) -> None:
    assert alike(lengths, most) == found
