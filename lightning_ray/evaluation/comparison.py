"""Two evaluations of the same tasks, task by task."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import ConfigError
from lightning_ray.evaluation.figures import rewards_by_task
from lightning_ray.evaluation.plays import Play
from lightning_ray.evaluation.report import EvaluationReport, number, read_report
from lightning_ray.evaluation.statistics import Estimate, Paired, mean_reward, paired

if TYPE_CHECKING:
    from rich.console import Console

Rewards = list[list[float | None]]


@dataclass(frozen=True)
class Line:
    """One figure of both, over the tasks that both have rewards of, and its paired test."""

    name: str
    first: Estimate
    second: Estimate
    paired: Paired


@dataclass(frozen=True)
class Comparison:
    """``first`` against ``second``; differences are the first's less the second's."""

    first: str
    second: str
    lines: list[Line]
    """Of the reward, of successes where they differ from it, and of the reward by tag."""
    unpaired: int
    """Tasks that only one has rewards of."""

    @property
    def reward(self) -> Paired:
        """Of the mean reward."""
        return self.lines[0].paired

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def show(self, console: Console) -> None:
        """Print a table."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(f"A: {self.first}\nB: {self.second}"), title_justify="left")
        for column in ("", "A", "B", "A - B", "interval", "p", "tasks"):
            table.add_column(column, justify="left" if not column else "right")
        for line in self.lines:
            test = line.paired
            between = "" if test.low is None else f"{test.low:+.3f} to {test.high:+.3f}"
            p = f"{test.p:.4f}" + ("" if test.exact else " ~")
            values = [number(line.first.value), number(line.second.value), f"{test.difference:+.3f}"]
            table.add_row(escape(line.name), *values, between, p, str(test.tasks))
        console.print(table)
        if self.unpaired:
            console.print(f"{self.unpaired} tasks are left out: only one of both has a reward of them", highlight=False)


def compare(first: EvaluationReport | str | Path, second: EvaluationReport | str | Path) -> Comparison:
    """Compare two evaluations, or their folders, by a paired permutation test over the tasks that both played.

    Tasks are the same if their content is. Raises ConfigError if there are none, or no reward of one by both.
    """
    one, other = (each if isinstance(each, EvaluationReport) else read_report(Path(each)) for each in (first, second))
    pairs, lonely = same_tasks(one.plays, other.plays)
    if not pairs:
        raise ConfigError(f"{one.title} and {other.title} have no task in common: evaluate both on the same tasks")
    scale = one.settings.scale
    failed = one.settings.failed_reward, other.settings.failed_reward
    mine, theirs = (
        [reward for plays in pairs for reward in rewards_by_task(plays[side], failed[side]).values()] for side in (0, 1)
    )
    both = [any(r is not None for r in a) and any(r is not None for r in b) for a, b in zip(mine, theirs, strict=True)]
    if not any(both):
        raise ConfigError(f"{one.title} and {other.title} have no task of which both have a reward")
    kept = [index for index, known in enumerate(both) if known]
    lines = [_line("reward", mine, theirs, kept, scale.confidence)]
    one_reached, other_reached = (_reached(side, scale.threshold) for side in (mine, theirs))
    if (one_reached, other_reached) != (mine, theirs):
        name = f"success (reward >= {scale.threshold:g})"
        lines.append(_line(name, one_reached, other_reached, kept, scale.confidence))
    tagged: defaultdict[str, list[int]] = defaultdict(list)
    for index in kept:
        for tag in pairs[index][0][0].tags:
            tagged[tag].append(index)
    lines += [_line(f"reward, {tag}", mine, theirs, where, scale.confidence) for tag, where in sorted(tagged.items())]
    return Comparison(one.title, other.title, lines, lonely + len(both) - len(kept))


def same_tasks(first: Sequence[Play], second: Sequence[Play]) -> tuple[list[tuple[list[Play], list[Play]]], int]:
    """The plays of each task by both, and how many tasks only one of them has."""
    one, other = _by_content(first), _by_content(second)
    return [(plays, other[name]) for name, plays in one.items() if name in other], len(one.keys() ^ other.keys())


def _by_content(plays: Sequence[Play]) -> dict[tuple[str, int], list[Play]]:
    """By content, and by place among the tasks of the same content."""
    by_task: defaultdict[int, list[Play]] = defaultdict(list)
    for play in plays:
        by_task[play.task].append(play)
    seen: Counter[str] = Counter()
    found = {}
    for _, theirs in sorted(by_task.items()):
        key = theirs[0].key
        found[key, seen[key]] = theirs
        seen[key] += 1
    return found


def _line(name: str, mine: Rewards, theirs: Rewards, kept: Sequence[int], confidence: float) -> Line:
    a, b = [mine[index] for index in kept], [theirs[index] for index in kept]
    test = paired(a, b, confidence)
    assert test is not None
    return Line(name, mean_reward(a, confidence), mean_reward(b, confidence), test)


def _reached(rewards: Rewards, threshold: float) -> Rewards:
    return [[None if r is None else float(r >= threshold) for r in task] for task in rewards]
