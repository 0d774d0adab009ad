"""An evaluation that was played: its plays and figures, as a folder keeps them and a person reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import ConfigError
from lightning_ray.evaluation.figures import Evaluation, figures_of
from lightning_ray.evaluation.plays import Play
from lightning_ray.evaluation.settings import EvaluationSettings
from lightning_ray.evaluation.statistics import Estimate
from lightning_ray.relay.spend import Spend
from lightning_ray.run.folder import write_json

if TYPE_CHECKING:
    from rich.console import Console

FILE = "eval.json"
REASONS = 3
"""Reasons of failures that are shown, most frequent first."""


@dataclass(frozen=True)
class EvaluationReport:
    """What ``Trainer.validate`` returns. The folder has it as ``eval.json``, beside the store with every span."""

    folder: Path
    subject: dict[str, Any]
    """What was evaluated: ``title``, and the model or endpoint, ``weight_version`` and ``proof``."""
    data: str
    """Which tasks were played, in words."""
    settings: EvaluationSettings
    sampling: str
    plays: Sequence[Play]
    seconds: float

    @property
    def title(self) -> str:
        """Of the subject."""
        return str(self.subject["title"])

    @cached_property
    def figures(self) -> Evaluation:
        """Over all plays."""
        return figures_of(self.plays, self.settings.scale)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "subject": self.subject,
            "data": self.data,
            "sampling": self.sampling,
            "settings": self.settings.model_dump(mode="json"),
            "seconds": round(self.seconds, 1),
            "figures": self.figures.as_dict(),
            "plays": [asdict(play) for play in self.plays],
        }

    def write(self) -> None:
        """Keep it in its folder."""
        write_json(self.folder / FILE, self.as_dict())

    def show(self, console: Console) -> None:
        """Print tables."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(f"{self.title}: {self.data}"), title_justify="left")
        for name in ("", "value", f"{self.settings.confidence:.0%} interval"):
            table.add_column(name, justify="left" if not name else "right")
        for row in rows_of(self.figures, self.settings.threshold, self.sampling):
            table.add_row(*map(escape, row))
        console.print(table)
        if self.figures.failures:
            console.print(failure_lines(self.plays), markup=False, highlight=False)


def read_report(folder: Path) -> EvaluationReport:
    """The report in a folder. Raises ConfigError if there is none."""
    file = folder / FILE
    if not file.is_file():
        raise ConfigError(f"{folder} has no {FILE}: it is no evaluation's folder, or it was not ended")
    told = json.loads(file.read_text())
    names = {field.name for field in fields(Play)}
    plays = [
        Play(
            **{name: value for name, value in each.items() if name in names - {"spend", "tags"}},
            tags=tuple(each["tags"]),
            spend={name: Spend(**spend) for name, spend in each["spend"].items()},
        )
        for each in told["plays"]
    ]
    settings = EvaluationSettings(**told["settings"])
    return EvaluationReport(
        folder, told["subject"], told["data"], settings, told["sampling"], plays, float(told["seconds"])
    )


def rows_of(figures: Evaluation, threshold: float, sampling: str) -> list[list[str]]:
    """Name, value and interval of each figure."""
    rows = [estimate_row("reward", Estimate(figures.reward, figures.low, figures.high))]
    if figures.success is not None and figures.success.value != figures.reward:
        rows.append(estimate_row(f"success (reward >= {threshold:g})", figures.success))
    rows += [estimate_row(f"pass@{k}", estimate) for k, estimate in figures.pass_at.items() if k != "1"]
    for tag, theirs in figures.tags.items():
        rows.append(estimate_row(f"reward, {tag} ({theirs.tasks} tasks)", theirs.reward))
    rows += [[name, number(value), ""] for name, value in figures.annotations.items()]
    rows.append(["tasks / rollouts", f"{figures.tasks} / {figures.rollouts}", sampling])
    rows.append(["turns", number(figures.turns), ""])
    rows.append(["seconds of a rollout", number(figures.seconds), ""])
    rows += [[f"failed: {kind}", str(count), ""] for kind, count in figures.failures.items()]
    return rows + spend_rows(figures.spend)


def spend_rows(spend: Mapping[str, Spend]) -> list[list[str]]:
    """By endpoint: tokens in and out, and what they cost where there are prices."""
    rows = []
    for name, each in spend.items():
        money = f"cost {each.money:.4g}" if each.money else ""
        rows.append([f"{name}: tokens in / out", f"{each.prompt_tokens} / {each.completion_tokens}", money])
    return rows


def estimate_row(name: str, estimate: Estimate) -> list[str]:
    """A figure with its interval."""
    interval = "" if estimate.low is None or estimate.high is None else f"{estimate.low:.3f} to {estimate.high:.3f}"
    return [name, number(estimate.value), interval]


def number(value: float | None) -> str:
    """A figure in a table."""
    return "-" if value is None else f"{value:.3f}"


def failure_lines(plays: Sequence[Play]) -> str:
    """The most frequent reasons of failures, a line each."""
    from collections import Counter

    counts = Counter((play.failure, " ".join((play.reason or "").split())[:160]) for play in plays if play.failure)
    lines = [f"{count} x {kind}: {reason}" for (kind, reason), count in counts.most_common(REASONS)]
    return "\n".join(lines)
