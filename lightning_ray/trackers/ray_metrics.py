"""The figures of steps and validations as metrics of Ray's, for Prometheus and Grafana beside the cluster's own.

Which there are, and those that do not come with a row, is ``lightning_ray.metrics``'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.metrics.exporter import Exporter
from lightning_ray.run.policy_rows import policies_in, rows_of
from lightning_ray.run.state import ONLY
from lightning_ray.trackers.base import Row

OF_RUN = {"reward": "reward", "turns": "turns", "wall_seconds": "step_seconds"}
"""Figure -> gauge."""
OF_POLICY = {
    "reward": "policy_reward",
    "response_tokens_mean": "response_tokens",
    "update.staleness_mean": "staleness",
    "update.staleness_max": "staleness_max",
    "sampled_tokens_per_s": "sampled_tokens_per_second",
    "trained_tokens_per_s": "trained_tokens_per_second",
    "weight_version": "weight_version",
}
COUNTED = {
    "sampled_tokens": "sampled_tokens",
    "update.trained_tokens": "trained_tokens",
    "rollouts_trained": "rollouts_trained",
}
"""Figure of a policy -> counter."""
FIGURES = (
    *("loss", "grad_norm", "learning_rate", "entropy", "nll", "clip_share", "approx_kl", "reference_kl"),
    *("ratio_mean", "ratio_max", "capped_share", "rejected_share", "max_logprob_diff", "teacher_kl", "seconds"),
)
"""Of an update, those that are exported."""


class RayMetrics:
    """Sets the metrics of one run."""

    def __init__(self, run_name: str):
        self._export = Exporter(run=run_name)

    def log(self, row: Row) -> None:
        """Set the figures of a step or of a greedy validation."""
        if row["kind"] == "train":
            self._step(row)
            policies = policies_in([row])
            for policy in policies or [ONLY]:
                [own] = rows_of([row], policy if policies else None)
                self._policy(policy, own)
        elif row["kind"] == "val" and row.get("mode") == "greedy":
            self._export.set("validation_reward", row["reward"])

    def close(self) -> None:
        """Ray forgets them with the process."""

    def _step(self, row: Row) -> None:
        export = self._export
        export.set("step", row["step"] + 1)
        export.add("rollouts", row.get("rollouts"))
        for figure, gauge in OF_RUN.items():
            export.set(gauge, row.get(figure))
        for phase, share in _behind("time.", row).items():
            export.add("phase_seconds", share * row["wall_seconds"], phase=phase)

    def _policy(self, policy: str, row: Mapping[str, Any]) -> None:
        export = self._export
        for figure, gauge in OF_POLICY.items():
            export.set(gauge, row.get(figure), policy=policy)
        for figure, counter in COUNTED.items():
            export.add(counter, row.get(figure), policy=policy)
        for reason, count in _behind("dropped.", row).items():
            export.add("rollouts_dropped", count, policy=policy, reason=reason)
        for figure in FIGURES:
            export.set("update", row.get(f"update.{figure}"), policy=policy, figure=figure)
        if row.get("swap_ms") is not None:
            export.set("swap_seconds", row["swap_ms"] / 1e3, policy=policy)
        for part, milliseconds in _behind("swap_ms.", row).items():
            export.set("swap_part_seconds", milliseconds / 1e3, policy=policy, part=part)


def _behind(prefix: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
