"""How a benchmark shows what it measured: a table of the figures with goals, and one of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.store import Goal, verdict


def show(subject: str, goals: Sequence[Goal], figures: Mapping[str, Any]) -> None:
    """Print both; goals whose figure was not measured are left out."""
    table = Table(title=f"{subject}, {figures['machine']}, {figures['date']}")
    for column in ("figure", "measured", "target", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right", no_wrap=True)
    for goal in goals:
        if goal.key in figures:
            value = figures[goal.key]
            bound = f"{'≥' if goal.least else '≤'} {goal.target:,}"
            table.add_row(goal.key, f"{value:,}", bound, verdict(value, goal))
    others = Table(title="other figures", show_header=False)
    for key in sorted(figures.keys() - {goal.key for goal in goals}):
        others.add_row(key, str(figures[key]))
    console = Console(width=100)
    console.print(table)
    console.print(others)
