"""How the doctor shows steps: those that left most rollouts out, or of one step each of its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_ray.trajectories.step_accounts import TRAINED, StepAccount

MOST = 12
"""Steps told of, if more left rollouts out."""


def show_steps(steps: Sequence[StepAccount], groups: bool, width: int | None) -> None:
    """A table on standard output, if a rollout was left out; ``groups`` tells of those of the only step."""
    from rich.console import Console
    from rich.table import Table

    if not any(step.dropped for step in steps):
        return
    title, columns, rows = of_groups(steps[0]) if groups else of_steps(steps)
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("group", "left out") else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=width, highlight=False).print("", table, sep="\n")


def of_groups(step: StepAccount) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    title = f"groups of step {step.step}" + (f", which trained version {step.version}" * (step.version is not None))
    rows = [[name, str(counts.get(TRAINED, 0)), left_out(counts)] for name, counts in step.groups.items()]
    return title, ["group", "trained", "left out"], rows


def of_steps(steps: Sequence[StepAccount]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    losing = [step for step in steps if step.dropped]
    most = sorted(losing, key=lambda step: -sum(step.dropped.values()))[:MOST]
    title = f"{len(losing)} of {len(steps)} steps left rollouts out" + ("; the most" * (len(losing) > MOST))
    rows = [
        [
            str(step.step),
            "-" if step.version is None else str(step.version),
            f"{step.taught} of {len(step.groups)}",
            str(step.counts[TRAINED]),
            left_out(step.dropped),
        ]
        for step in sorted(most, key=lambda step: step.step)
    ]
    return title, ["step", "version", "groups that taught", "trained", "left out"], rows


def left_out(counts: Mapping[str, int]) -> str:
    """Reasons with their numbers of rollouts."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items() if reason != TRAINED)
