"""Estimates over tasks: means with intervals, pass@k, and the paired test of two evaluations.

A task's rewards are one cluster: what is estimated is the mean over tasks of each task's mean, and what varies is the
task. Rewards that were lost (None) are nobody's zero: the point leaves them out, and the ends of the interval are
those of the lowest and of the highest that they could have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

Rewards = Sequence[Sequence[float | None]]
"""Of each task, those of its rollouts."""
EXACT = 20
"""Differences that are not 0 up to which all signs are tried: 2**20 sums."""
DRAWS = 100_000
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(80)


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval; None where there is too little to tell."""

    value: float | None
    low: float | None = None
    high: float | None = None


def mean_reward(rewards: Rewards, confidence: float = 0.95) -> Estimate:
    """The mean over tasks, in Wilson's interval where all rewards are 0 or 1, in Student's over the tasks elsewhere."""
    known = [reward for task in rewards for reward in task if reward is not None]
    if not known:
        return Estimate(None)
    share = set(known) <= {0.0, 1.0}
    interval = share_interval if share else mean_interval
    return _over_lost(rewards, known, lambda filled: interval(filled, confidence))


def pass_at_k(rewards: Rewards, k: int, threshold: float = 1.0, confidence: float = 0.95) -> Estimate:
    """How likely one of ``k`` rollouts of a task reaches the threshold; over the tasks with at least ``k`` rewards.

    The estimator of each task is unbiased (Chen et al., 2021, "Evaluating Large Language Models Trained on Code"). For
    k above 1 the interval counts tasks alone, whatever their samples: most tasks are close to 1 then, and of the few
    others a sample of tasks shows too little for a narrower one to hold.
    """
    reached = [[None if r is None else float(r >= threshold) for r in task] for task in rewards]
    known = [success for task in reached for success in task if success is not None]

    def interval(filled: Sequence[Sequence[float]]) -> Estimate:
        large = [task for task in filled if len(task) >= k]
        shares = [unbiased_pass_at_k(len(task), int(sum(task)), k) for task in large]
        counted = sum(map(len, large)) if k == 1 else len(large)
        return _wilson(shares, counted, confidence) if shares else Estimate(None)

    return _over_lost(reached, known, interval)


def unbiased_pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): of ``n`` samples, ``correct`` of them right, a random ``k`` has a right one."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {correct} right among {n}: k is between 1 and n, and 0 <= correct <= n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean_interval(rewards: Sequence[Sequence[float]], confidence: float = 0.95) -> Estimate:
    """Student's interval over the tasks' means; a single task has none."""
    means = np.array([np.mean(task) for task in rewards])
    value = float(means.mean())
    if len(means) < 2:
        return Estimate(value)
    half = t_quantile(0.5 + confidence / 2, len(means) - 1) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return Estimate(value, value - half, value + half)


def share_interval(rewards: Sequence[Sequence[float]], confidence: float = 0.95) -> Estimate:
    """Wilson's interval of a share; several rollouts of a task count for as many as they are worth (``_wilson``)."""
    return _wilson([float(np.mean(task)) for task in rewards], sum(map(len, rewards)), confidence)


def _wilson(shares: Sequence[float], samples: int, confidence: float) -> Estimate:
    """Wilson's score interval of the mean of the tasks' shares.

    Its sample size is the effective one, p(1 - p) over the variance that the tasks show (Korn & Graubard, 1998), at
    most ``samples``; the number of tasks where they show none.
    """
    tasks, p = len(shares), float(np.mean(shares))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    variance = float(np.var(shares, ddof=1)) / tasks if tasks > 1 else 0.0
    n = float(tasks)
    if samples > tasks and tasks > 1 and variance > 0:
        n = min(float(samples), p * (1 - p) / variance)
        n *= (z / t_quantile(0.5 + confidence / 2, tasks - 1)) ** 2
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, center - half)), min(1.0, max(p, center + half)))


def _over_lost(
    rewards: Rewards, known: Sequence[float], interval: Callable[[Sequence[Sequence[float]]], Estimate]
) -> Estimate:
    """The interval, widened by what lost rewards could have been: within [0, 1] if the known ones are."""
    if not known:
        return Estimate(None)
    found = interval([kept for task in rewards if (kept := [r for r in task if r is not None])])
    if found.value is None or all(r is not None for task in rewards for r in task):
        return found
    inside = min(known) >= 0 and max(known) <= 1
    lowest, highest = (0.0, 1.0) if inside else (min(known), max(known))
    worst, best = (
        interval([[fill if r is None else r for r in task] for task in rewards if task]) for fill in (lowest, highest)
    )
    lows = [end for end in (found.low, worst.low) if end is not None]
    highs = [end for end in (found.high, best.high) if end is not None]
    return Estimate(found.value, min(lows, default=None), max(highs, default=None))


@dataclass(frozen=True)
class Paired:
    """The mean difference of two over the same tasks, and how likely one at least as large is by chance alone."""

    difference: float
    low: float | None
    high: float | None
    p: float
    exact: bool
    """Whether all assignments were tried, rather than random ones."""
    tasks: int


def paired(first: Rewards, second: Rewards, confidence: float = 0.95, seed: int = 0) -> Paired | None:
    """``first`` less ``second``, task by task; tasks that either has no reward of are left out. None without a task.

    The p value is the two-sided paired permutation test's (Fisher, 1935): under the null hypothesis each task's
    difference has either sign. The interval is Agresti and Min's (2005) for one 0-or-1 reward a task each, Student's
    elsewhere.
    """
    pairs = [
        (a, b)
        for one, other in zip(first, second, strict=True)
        if (a := [r for r in one if r is not None]) and (b := [r for r in other if r is not None])
    ]
    if not pairs:
        return None
    differences = np.array([float(np.mean(a)) - float(np.mean(b)) for a, b in pairs])
    p, exact = sign_flip(differences, seed)
    single = all(len(rewards) == 1 and rewards[0] in (0.0, 1.0) for pair in pairs for rewards in pair)
    interval = _agresti_min(differences, confidence) if single else mean_interval(differences[:, None], confidence)  # type: ignore[arg-type]
    return Paired(float(differences.mean()), interval.low, interval.high, p, exact, len(pairs))


def sign_flip(differences: np.ndarray, seed: int = 0) -> tuple[float, bool]:
    """The two-sided p value of a mean of 0, and whether it is exact; differences of 0 have no sign to flip."""
    moved = differences[differences != 0]
    least = abs(float(moved.sum())) * (1 - 1e-9)
    if len(moved) <= EXACT:
        sums = np.zeros(1)
        for difference in moved:
            sums = np.concatenate([sums + difference, sums - difference])
        return float((np.abs(sums) >= least).mean()), True
    draw, reached = np.random.default_rng(seed), 0
    for count in (DRAWS // 100,) * 100:
        signs = draw.choice([-1.0, 1.0], size=(count, len(moved)))
        reached += int((np.abs(signs @ moved) >= least).sum())
    return (1 + reached) / (1 + DRAWS), False


def _agresti_min(differences: np.ndarray, confidence: float) -> Estimate:
    """Of -1, 0 and 1, with half a pair more in each cell of the two-by-two table: never without width."""
    n = len(differences) + 2
    mean = float(differences.sum()) / n
    variance = (float(np.abs(differences).sum()) + 1 - n * mean**2) / n**2
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance)
    return Estimate(float(differences.mean()), max(-1.0, mean - half), min(1.0, mean + half))


@lru_cache
def t_quantile(p: float, df: int) -> float:
    """Student's t distribution's quantile, for ``p`` of at least a half; absolute error below 1e-8 of its angle.

    With t = sqrt(df) tan(u) the density becomes a multiple of cos(u) ** (df - 1), which is integrated by Gauss's rule.
    """
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        nodes = angle / 2 * (_NODES + 1)
        below = 0.5 + scale * angle / 2 * float(_WEIGHTS @ np.cos(nodes) ** (df - 1))
        low, high = (angle, high) if below < p else (low, angle)
    return math.sqrt(df) * math.tan((low + high) / 2)
