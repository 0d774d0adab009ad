"""Pictures of a run, made of the rows of its metrics.jsonl.

``reward.png`` is the curve to look at first. ``training.png`` shows beside it how the policy changes, what it says, how
old the tokens are, and where the time goes. A figure that the rows lack is left out of its panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LIGHT, BLUE, ORANGE, DARK_ORANGE, GREEN, PURPLE, GREY = (
    "#9ecae1",
    "#2171b5",
    "#fd8d3c",
    "#d94801",
    "#238b45",
    "#756bb1",
    "#969696",
)
PHASES = {
    "rollouts": ("waiting for rollouts", "#9ecae1"),
    "settle": ("settle", "#6baed6"),
    "teacher": ("teacher", "#dadaeb"),
    "update": ("update", "#fd8d3c"),
    "swap": ("swap", "#d94801"),
    "validate": ("validate", "#74c476"),
    "checkpoint": ("checkpoint", "#9e9ac8"),
    "restart": ("restart", "#de2d26"),
    "other": ("other", "#d9d9d9"),
}
"""Name in the rows -> what it is called, and its colour; from the bottom up."""


def plot_reward(rows: list[Row], path: Path, title: str) -> None:
    """Mean reward of each step, its running mean, and the validations."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    _reward_panel(axes, rows)
    axes.set(xlabel="step", ylabel="mean reward", title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_training(rows: list[Row], path: Path, title: str) -> None:
    """Six panels over the steps."""
    plt = _pyplot()
    figure, panels = plt.subplots(2, 3, figsize=(15, 7.5), sharex=True, layout="constrained")
    train = [row for row in rows if row["kind"] == "train"]
    _reward_panel(panels[0, 0], rows)
    _policy_panel(panels[0, 1], train)
    _length_panel(panels[0, 2], train)
    _staleness_panel(panels[1, 0], train)
    _time_panel(panels[1, 1], train)
    _swap_panel(panels[1, 2], train)
    titles = ("reward", "policy", "lengths and turns", "age of the trained tokens", "time by phase", "weight swap")
    for axes, name in zip(panels.flat, titles, strict=True):
        _head(axes, name)
        axes.tick_params(labelbottom=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[1]:
        axes.set_xlabel("step")
    panels[0, 0].set_xlim(0, max((row["step"] + 1.5 for row in train), default=1))
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps, from 1, and values of a figure in the rows that have it."""
    found = [(row["step"] + 1, row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float]) -> list[float]:
    """Over a tenth of the values that came before."""
    window = max(1, len(values) // 10)
    parts = [values[max(0, index - window) : index + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _reward_panel(axes: Any, rows: list[Row]) -> None:
    steps, rewards = series([row for row in rows if row["kind"] == "train"], "reward")
    if steps:
        axes.plot(steps, rewards, color=LIGHT, linewidth=1, label="training reward, sampled")
        axes.plot(steps, running_mean(rewards), color=BLUE, linewidth=2, label="its running mean")
    for mode, style, color in (("sampled", "s", ORANGE), ("greedy", "o", DARK_ORANGE)):
        found = [(r["step"], r["reward"]) for r in rows if r["kind"] == "val" and r["mode"] == mode]
        found = [(step, reward) for step, reward in found if reward is not None]
        if found:
            x, y = zip(*found, strict=True)
            axes.plot(x, y, style, color=color, linestyle="--", label=f"validation, {mode}")
    _finish(axes)


def _policy_panel(axes: Any, rows: list[Row]) -> None:
    """Entropy to the left, with what is imitated its likelihood; divergences to the right."""
    _line(axes, rows, "update.entropy", BLUE, "entropy")
    _line(axes, rows, "update.nll", GREEN, "negative log-likelihood")
    axes.set_ylabel("nats per token (entropy)")
    right = axes.twinx()
    _line(right, rows, "update.approx_kl", ORANGE, "KL, engine to trainer")
    _line(right, rows, "update.reference_kl", PURPLE, "KL, reference")
    _line(right, rows, "update.teacher_kl", GREY, "KL, teacher")
    right.set_ylabel("nats per token (KL)")
    _finish(axes, right)


def _length_panel(axes: Any, rows: list[Row]) -> None:
    """Tokens to the left, mean and longest; turns to the right."""
    for name, color in (("prompt", GREEN), ("response", BLUE), ("trajectory", GREY)):
        _line(axes, rows, f"{name}_tokens_mean", color, name)
        _line(axes, rows, f"{name}_tokens_max", color, None, linewidth=0.8, linestyle=":")
    axes.set_ylabel("tokens (dotted: longest)")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    _line(right, rows, "turns", DARK_ORANGE, "turns")
    right.set_ylim(bottom=0)
    right.set_ylabel("turns")
    _finish(axes, right)


def _staleness_panel(axes: Any, rows: list[Row]) -> None:
    """Shares of the trained tokens by how many versions old they are, as bars on each other."""
    rows = [row for row in rows if row.get("update.staleness_mean") is not None]
    names = {name for row in rows for name in row if name.startswith("update.staleness_")}
    ages = sorted(int(name.rpartition("_")[2]) for name in names if name.rpartition("_")[2].isdigit())
    colors = _pyplot().get_cmap("YlGnBu")
    shades = [colors(0.25 + 0.7 * index / len(ages)) for index in range(len(ages))]
    labels = [f"{age} version{'' if age == 1 else 's'} old" for age in ages]
    _stack(axes, rows, [(f"update.staleness_{age}", *shown) for age, *shown in zip(ages, labels, shades, strict=True)])
    axes.set_ylabel("share of tokens")


def _time_panel(axes: Any, rows: list[Row]) -> None:
    """Shares of the time since the step before, and to the right how long that was."""
    rows = [row for row in rows if row.get("wall_seconds")]
    found = [(f"time.{name}", *shown) for name, shown in PHASES.items() if any(f"time.{name}" in row for row in rows)]
    _stack(axes, rows, found)
    axes.set_ylabel("share of time")
    right = axes.twinx()
    steps, seconds = series(rows, "wall_seconds")
    right.plot(steps, seconds, color="black", linewidth=0.9)
    right.set_ylabel("seconds per step (line)")
    right.set_ylim(bottom=0)


def _swap_panel(axes: Any, rows: list[Row]) -> None:
    """Milliseconds to the left, 10^9 bytes a second to the right."""
    _line(axes, rows, "swap_ms", DARK_ORANGE, "swap, to its proof")
    _line(axes, rows, "swap_ms.apply", ORANGE, "of it loading", linestyle="--")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    _line(right, rows, "swap_gb_per_s", GREY, "GB/s")
    right.set_ylabel("GB/s")
    right.set_ylim(bottom=0)
    _finish(axes, right)


def _line(axes: Any, rows: Sequence[Row], name: str, color: Any, label: str | None, **style: Any) -> None:
    steps, values = series(rows, name)
    if steps:
        marker = "." if len(steps) < 3 else None
        axes.plot(steps, values, color=color, label=label, marker=marker, **{"linewidth": 1.5, **style})


def _stack(axes: Any, rows: Sequence[Row], parts: Sequence[tuple[str, str, Any]]) -> None:
    """Bars of (figure, label, colour) on each other, one bar a row."""
    steps = [row["step"] + 1 for row in rows]
    bottom = [0.0] * len(rows)
    for name, label, color in parts:
        values = [row.get(name) or 0.0 for row in rows]
        axes.bar(steps, values, bottom=bottom, width=1.0, color=color, label=label)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    axes.set_ylim(0, 1)


def _finish(axes: Any, right: Any = None) -> None:
    """Grid; a right side without curves has no scale."""
    axes.grid(alpha=0.3)
    if right is not None:
        right.set_visible(bool(right.get_legend_handles_labels()[0]))


def _head(axes: Any, title: str) -> None:
    """The title, and under it the legend of both sides, so that no curve is covered."""
    sides = [side for side in axes.figure.axes if side.get_subplotspec() == axes.get_subplotspec()]
    handles: list[Any] = []
    labels: list[str] = []
    for side in sides:
        more = side.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    columns = 2 if sum(map(len, labels[:4])) > 60 else 4
    lines = -(-len(handles) // columns)
    axes.set_title(title, fontsize=11, loc="left", pad=6 + 13 * lines)
    if not handles:
        axes.text(0.5, 0.5, "no figures", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    legend = axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        ncols=columns,
        fontsize=8,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.4,
    )
    legend.set_in_layout(False)
