"""Estimates and tests of evaluations against values that are known from elsewhere."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from lightning_ray.evaluation.statistics import (
    mean_interval,
    mean_reward,
    paired,
    pass_at_k,
    sign_flip,
    t_quantile,
    unbiased_pass_at_k,
)


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.7062047362),
        (0.975, 2, 4.3026527297),
        (0.975, 9, 2.2621571628),
        (0.95, 5, 2.0150483733),
        (0.975, 1000, 1.9623390808),
    ],
)
def test_quantiles_of_student(p: float, df: int, expected: float) -> None:
    assert t_quantile(p, df) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), table I: Wilson's score interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_of_single_rollouts_has_wilsons_interval(right: int, n: int, low: float, high: float) -> None:
    found = mean_reward([[1.0]] * right + [[0.0]] * (n - right))
    assert found.value == pytest.approx(right / n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_other_rewards_have_students_interval() -> None:
    found = mean_reward([[x] for x in (2.0, 4.0, 4.0, 6.0)])
    half = 3.1824463053 * math.sqrt(8 / 3) / 2
    assert found.value == 4.0 and found.low == pytest.approx(4 - half) and found.high == pytest.approx(4 + half)
    assert mean_reward([[0.5, 0.7]]).low is None, "one task tells nothing of others"
    assert mean_reward([]).value is None and mean_reward([[None]]).value is None


def test_rollouts_of_one_task_are_no_tasks_of_their_own() -> None:
    same = [[1.0] * 8] * 5 + [[0.0] * 8] * 5
    ten, eighty = mean_reward([[1.0]] * 5 + [[0.0]] * 5), mean_reward([[1.0]] * 40 + [[0.0]] * 40)
    clustered = mean_reward(same)
    assert clustered.high - clustered.low > ten.high - ten.low > eighty.high - eighty.low  # type: ignore[operator]
    spread = mean_reward([[1.0, 0.0] * 4] * 10)
    assert spread.high - spread.low == pytest.approx(ten.high - ten.low), "no variance seen: as many as tasks"  # type: ignore[operator]
    draw = random.Random(0)
    inside = 0
    for _ in range(400):
        skills = [draw.choice((0.1, 0.9)) for _ in range(12)]
        found = mean_reward([[float(draw.random() < skill) for _ in range(6)] for skill in skills])
        inside += found.low <= 0.5 <= found.high  # type: ignore[operator]
    assert inside / 400 > 0.92, "at least 95 % by its name"


def test_what_was_lost_could_have_been_anything() -> None:
    known = mean_reward([[1.0]] * 8 + [[0.0]] * 2)
    lost = mean_reward([[1.0]] * 8 + [[0.0]] * 2 + [[None]] * 2)
    assert lost.value == known.value == 0.8
    assert lost.low == mean_reward([[1.0]] * 8 + [[0.0]] * 4).low < known.low  # type: ignore[operator]
    assert lost.high == mean_reward([[1.0]] * 10 + [[0.0]] * 2).high > known.high  # type: ignore[operator]
    beyond = mean_reward([[3.0], [5.0], [None]])
    assert beyond.value == 4.0 and beyond.low == min(
        mean_interval([[3.0], [5.0]]).low,  # type: ignore[type-var]
        mean_interval([[3.0], [5.0], [3.0]]).low,
    )


def test_pass_at_k_is_the_share_of_draws_with_a_success() -> None:
    for n, correct, k in ((5, 2, 2), (6, 0, 3), (6, 6, 1), (7, 3, 5)):
        samples = [True] * correct + [False] * (n - correct)
        draws = list(itertools.combinations(samples, k))
        assert unbiased_pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="pass@4"):
        unbiased_pass_at_k(3, 1, 4)
    found = pass_at_k([[1.0, 0.2, 0.0, 0.0], [0.0] * 4, [1.0, None, None, None]], 2, threshold=0.2)
    assert found.value == pytest.approx((1 - 1 / 6 + 0) / 2), "a task with one reward tells nothing of two"
    assert pass_at_k([[1.0]], 2).value is None


def test_the_permutation_test_tries_all_signs() -> None:
    # Fisher (1935), "The Design of Experiments": Darwin's plants, 1726 of 2**15 sums at least as far from 0.
    darwin = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], float)
    p, exact = sign_flip(darwin)
    assert exact and p == pytest.approx(1726 / 32768)
    assert sign_flip(np.zeros(4)) == (1.0, True)
    by_chance, exact = sign_flip(np.concatenate([darwin, np.tile([1e-9, -1e-9], 5)]))
    assert not exact and by_chance == pytest.approx(1726 / 32768, abs=0.004)


def test_a_comparison_is_over_the_tasks_of_both() -> None:
    found = paired([[1.0], [1.0], [1.0], [0.0], [None]], [[0.0], [0.0], [0.0], [0.0], [1.0]])
    assert found is not None
    assert (found.tasks, found.difference, found.p, found.exact) == (4, 0.75, 0.25, True)
    # (c - b) / (n + 2) = 0.5, +- 1.959964 * sqrt((4 - 6 * 0.25) / 36)
    assert found.low == pytest.approx(0.5 - 1.959964 * math.sqrt(2.5) / 6) and found.high == 1.0
    same = paired([[1.0]] * 3, [[1.0]] * 3)
    assert same is not None and same.p == 1.0 and same.low < 0 < same.high  # type: ignore[operator]
    several = paired([[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]])
    assert several is not None and several.difference == 0.5 and several.low == several.high == 0.5
    assert paired([[None]], [[1.0]]) is None
