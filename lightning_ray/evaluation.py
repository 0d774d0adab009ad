"""What an evaluation shows: means over rollouts, and over the events that agents annotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_ray.trajectories.episode import Episode


@dataclass(frozen=True)
class Evaluation:
    """Figures of one pass over a data set.

    ``reward`` is the mean over the rollouts that succeeded; ``failed`` counts the others. ``annotations`` holds, by
    key, the mean over all annotated events (not over rollouts).
    """

    tasks: int
    failed: int
    reward: float | None
    turns: float | None
    sampled_tokens: int
    annotations: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def evaluate(episodes: Sequence[Episode]) -> Evaluation:
    """Figures over finished rollouts."""
    ended = [e for e in episodes if e.rollout.status == "succeeded" and e.reward is not None]
    events: dict[str, list[float]] = {}
    for episode in ended:
        for key, values in episode.annotations.items():
            events.setdefault(key, []).extend(values)
    return Evaluation(
        tasks=len(episodes),
        failed=len(episodes) - len(ended),
        reward=mean([e.reward for e in ended if e.reward is not None]),
        turns=mean([e.calls for e in ended]),
        sampled_tokens=sum(e.sampled_tokens for e in episodes),
        annotations={key: sum(values) / len(values) for key, values in sorted(events.items())},
    )


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None
