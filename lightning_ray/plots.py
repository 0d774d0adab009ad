"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_reward(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Mean reward of each step, its running mean, and the validations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [(row["step"] + 1, row["reward"]) for row in rows if row["kind"] == "train" and row["reward"] is not None]
    figure, axes = plt.subplots(figsize=(7, 4))
    if steps:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color="#9ecae1", linewidth=1, label="training reward, sampled")
        window = max(1, len(y) // 10)
        smooth = [sum(y[max(0, i - window) : i + 1]) / len(y[max(0, i - window) : i + 1]) for i in range(len(y))]
        axes.plot(x, smooth, color="#2171b5", linewidth=2, label="its running mean")
    for mode, style, color in (("sampled", "s", "#fd8d3c"), ("greedy", "o", "#d94801")):
        found = [(r["step"], r["reward"]) for r in rows if r["kind"] == "val" and r["mode"] == mode]
        if found:
            x, y = zip(*found, strict=True)
            axes.plot(x, y, style, color=color, linestyle="--", label=f"validation, {mode}")
    axes.set(xlabel="step", ylabel="mean reward", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
