"""Figures as metrics of Ray's, for Prometheus and Grafana beside the cluster's own: ``lightning_ray_*``, by run.

Those of a step come with its row; those of the queue are looked up every few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_ray.trackers.base import Row, is_number

if TYPE_CHECKING:
    from lightning_ray.store.base import Store

QUEUE_SECONDS = 5.0
GAUGES = {
    "step": ("step", "Training steps made."),
    "reward": ("reward", "Mean reward of the last step's rollouts."),
    "validation": ("validation_reward", "Mean reward of the last greedy validation."),
    "update.staleness_mean": ("staleness", "Mean age of the trained tokens in weight versions."),
    "swap_seconds": ("swap_seconds", "Of the last weight swap, from start to proof."),
    "sampled_tokens_per_s": ("sampled_tokens_per_second", "Tokens sampled in a second."),
    "trained_tokens_per_s": ("trained_tokens_per_second", "Tokens trained in a second of the update."),
    "trainer_restarts": ("trainer_restarts", "How often the trainer ranks were started anew."),
    "runner_restarts": ("runner_restarts", "How often the runners of now were started anew."),
    "queued": ("queue_length", "Rollouts that wait for a runner."),
    "live_attempts": ("running_rollouts", "Rollouts that are being played."),
}
"""Figure -> name and description."""
COUNTERS = {
    "sampled_tokens": ("sampled_tokens", "Tokens that the policy sampled for training."),
    "update.trained_tokens": ("trained_tokens", "Tokens that were trained."),
    "rollouts": ("rollouts", "Rollouts that were played for training."),
}


class RayMetrics:
    """Sets metrics of one run; each is made with its first value."""

    def __init__(self, run_name: str):
        self._tags = {"run": run_name}
        self._made: dict[str, Any] = {}

    def log(self, row: Row) -> None:
        """Set the figures of a step or of a greedy validation."""
        if row["kind"] == "train":
            swap = row.get("swap_ms")
            self.set({**row, "step": row["step"] + 1, "swap_seconds": None if swap is None else swap / 1e3})
            self._count(row)
        elif row["kind"] == "val" and row.get("mode") == "greedy":
            self.set({"validation": row["reward"]})

    def set(self, figures: Mapping[str, Any]) -> None:
        """Set the gauges of these figures."""
        from ray.util.metrics import Gauge

        for figure, (name, description) in GAUGES.items():
            if is_number(figures.get(figure)):
                self._metric(Gauge, name, description).set(float(figures[figure]), self._tags)

    def close(self) -> None:
        """Ray forgets them with the process."""

    def _count(self, row: Row) -> None:
        from ray.util.metrics import Counter

        for figure, (name, description) in COUNTERS.items():
            if is_number(row.get(figure)) and row[figure] > 0:
                self._metric(Counter, name, description).inc(float(row[figure]), self._tags)

    def _metric(self, make: Callable[..., Any], name: str, description: str) -> Any:
        if name not in self._made:
            self._made[name] = make(f"lightning_ray_{name}", description, tag_keys=("run",))
        return self._made[name]


async def watch_queue(run_name: str, store: Store, lives: Callable[[], list[int]]) -> None:
    """Until cancelled, keep the gauges of the queue; ``lives`` tells how often each runner was started."""
    metrics = RayMetrics(run_name)
    while True:
        try:
            known = await store.statistics()
            restarts = sum(max(0, count - 1) for count in lives())
            metrics.set({name: known[name] for name in ("queued", "live_attempts")} | {"runner_restarts": restarts})
        except Exception:  # the store is on its way back; those who need it tell of it
            pass
        await asyncio.sleep(QUEUE_SECONDS)
