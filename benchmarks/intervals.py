"""How often the intervals of an evaluation hold what they are for, and how often its paired test is wrong.

    python -m benchmarks.intervals [--draws 1000]

Tasks have a success probability of their own, drawn anew for each evaluation; what is estimated is its mean over all
tasks that there could be. Beside it an interval that takes rollouts of one task for independent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from lightning_ray.evaluation.statistics import Estimate, mean_reward, paired, pass_at_k

Rewards = list[list[float]]
MEANS = (0.1, 0.5, 0.9)
SIZES = ((10, 1), (10, 8), (30, 1), (30, 8), (100, 1), (100, 8))
"""Tasks, and rollouts of each."""
SPREAD = 2.0
"""Sum of the Beta distribution's parameters: tasks are as often hard or easy as in between."""


def play(draw: np.random.Generator, mean: float, tasks: int, samples: int) -> Rewards:
    """One evaluation's rewards."""
    skill = draw.beta(SPREAD * mean, SPREAD * (1 - mean), tasks)
    rewards: Rewards = (draw.random((tasks, samples)) < skill[:, None]).astype(float).tolist()
    return rewards


def covered(estimate: Estimate, truth: float) -> bool:
    """Whether an interval holds what it is for."""
    return estimate.low is not None and estimate.high is not None and estimate.low <= truth <= estimate.high


def independent(rewards: Rewards) -> Estimate:
    """As if every rollout were a task of its own."""
    return mean_reward([[reward] for task in rewards for reward in task])


def coverage(
    interval: Callable[[Rewards], Estimate], truth: float, mean: float, size: tuple[int, int], n: int
) -> float:
    """The share of ``n`` evaluations whose interval holds the truth."""
    draw = np.random.default_rng(0)
    return sum(covered(interval(play(draw, mean, *size)), truth) for _ in range(n)) / n


def true_pass_at(k: int, mean: float) -> float:
    """1 - E[(1 - p) ** k] of the Beta distribution."""
    b = SPREAD * (1 - mean)
    return float(1 - np.prod([(b + i) / (SPREAD + i) for i in range(k)]))


def wrong(size: tuple[int, int], n: int) -> float:
    """The share of comparisons of a model with itself that are told as different at the level of .05."""
    draw, found = np.random.default_rng(1), 0
    for _ in range(n):
        tasks, samples = size
        skill = draw.beta(SPREAD / 2, SPREAD / 2, tasks)
        a, b = ((draw.random((tasks, samples)) < skill[:, None]).astype(float).tolist() for _ in range(2))
        test = paired(a, b)
        found += test is not None and test.p <= 0.05
    return found / n


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--draws", type=int, default=1000, help="evaluations of each kind (default: %(default)s)")
    n = arguments.parse_args().draws
    table = Table(title=f"95% intervals, {n} evaluations of each kind; least and mean over means of {MEANS}")
    for column in ("tasks x rollouts", "mean reward", "as if independent", "pass@4", "same model told as different"):
        table.add_column(column, justify="right")
    for size in SIZES:
        ours = [coverage(mean_reward, mean, mean, size, n) for mean in MEANS]
        naive = [coverage(independent, mean, mean, size, n) for mean in MEANS]
        least = "-"
        if size[1] >= 4:
            shown = [coverage(lambda r: pass_at_k(r, 4), true_pass_at(4, mean), mean, size, n) for mean in MEANS]
            least = f"{min(shown):.3f}, {np.mean(shown):.3f}"
        cells = [f"{min(found):.3f}, {np.mean(found):.3f}" for found in (ours, naive)]
        table.add_row(f"{size[0]} x {size[1]}", *cells, least, f"{wrong(size, n // 4):.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
