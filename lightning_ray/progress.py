"""What a person sees while a run is at work: stages with their times, a live bar, a closing table.

On a terminal the bar is live; elsewhere (a Ray job's log, CI) each step is a line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

BAR_WIDTH = 44
"""Columns of the live bar that are not the step's line."""
FURTHER = {
    "time.rollouts": "waiting {:.0%}",
    "turns": "turns {:.1f}",
    "update.entropy": "entropy {:.2f}",
    "update.nll": "nll {:.3f}",
    "update.teacher_kl": "teacher {:.3f}",
    "update.staleness_mean": "age {:.1f}",
}
"""What the line of a step tells last, unless it is 0 or not known."""


def short_seconds(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    whole = round(seconds)
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{seconds:.1f}s"


class Reporter:
    """Prints the run to a console."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A part of the run with a name; prints how long it took."""
        began = time.perf_counter()
        stage = Stage(self, name)
        with stage.live():
            yield stage
        self.console.print(f"[green]✓[/] {name:<28} {short_seconds(time.perf_counter() - began):>8}{stage.suffix}")

    def note(self, text: str) -> None:
        """One line, above the bar if there is one."""
        console = self._bar.console if self._bar else self.console
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_steps(self, done: int, total: int) -> None:
        """Open the bar of the training steps; anew, where some are to be made again."""
        self.end_steps()
        self._steps, self._began = (done, total), time.perf_counter()
        if not self.console.is_terminal:
            return
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(16), TextColumn("{task.fields[line]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=self.console)
        self._task = self._bar.add_task("training", total=total, completed=done, line="")
        self._bar.start()

    def step(self, row: dict[str, Any], validation: float | None) -> None:
        """One finished step."""
        done = row["step"] + 1
        line = step_line(row, validation)
        if self._bar is not None and self._task is not None:
            shown = fitting(line, self.console.width - BAR_WIDTH)
            self._bar.update(self._task, completed=done, line=shown)
            return
        left = (time.perf_counter() - self._began) / max(1, done - self._steps[0]) * (self._steps[1] - done)
        self.console.print(
            f"step {done}/{self._steps[1]}  {line}  left {short_seconds(left)}", highlight=False, soft_wrap=True
        )

    def end_steps(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A closing table."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)


class Stage:
    """One running stage; long ones tell how far they are."""

    def __init__(self, reporter: Reporter, name: str):
        self._reporter = reporter
        self._name = name
        self._status: Any = None
        self.suffix = ""

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show a spinner on a terminal."""
        if not self._reporter.console.is_terminal:
            yield
            return
        with self._reporter.console.status(self._name) as self._status:
            yield

    def advance(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the stage is."""
        if self._status is not None:
            self._status.update(f"{self._name} {done}/{total} {text}")


def step_line(row: dict[str, Any], validation: float | None) -> str:
    """The figures of one step, in a line."""
    parts = [f"reward {row['reward']:.2f}" if row["reward"] is not None else "reward  -  "]
    if validation is not None:
        parts.append(f"val {validation:.2f}")
    parts.append(f"sampled {row['sampled_tokens_per_s']:.0f} tok/s")
    if row.get("trained_tokens_per_s"):
        parts.append(f"trained {row['trained_tokens_per_s']:.0f} tok/s")
    if row.get("swap_ms") is not None:
        parts.append(f"swap {row['swap_ms']:.0f} ms")
    parts += [text.format(row[name]) for name, text in FURTHER.items() if row.get(name)]
    return "  ".join(parts)


def fitting(line: str, width: int) -> str:
    """The leading figures of a step's line that a width has room for."""
    while len(line) > width and "  " in line:
        line = line.rpartition("  ")[0].rstrip()
    return line


_current: Stage | None = None


def advance(done: int, total: int, text: str = "") -> None:
    """Tell how far the running stage is, from code that is called by a run (a model maker, say)."""
    if _current is not None:
        _current.advance(done, total, text)


@contextmanager
def as_current(stage: Stage) -> Iterator[None]:
    """``advance`` speaks for ``stage`` in this context."""
    global _current
    before, _current = _current, stage
    try:
        yield
    finally:
        _current = before
