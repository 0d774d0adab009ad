"""What an evaluation shows: estimates over tasks, counts of what failed, and means over what agents annotated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_ray.evaluation.plays import AGENT, Play, plays_of
from lightning_ray.evaluation.statistics import Estimate, mean_reward, pass_at_k
from lightning_ray.relay.spend import Spend
from lightning_ray.trajectories.episode import Episode


@dataclass(frozen=True)
class Scale:
    """How rewards are read."""

    confidence: float = 0.95
    threshold: float = 1.0
    """The reward from which a rollout counts as a success."""
    pass_at: tuple[int, ...] = ()
    failed_reward: float | None = None
    """What a failure of the agent's own counts as; without one it is left out. The infrastructure's always is."""


@dataclass(frozen=True)
class TagFigures:
    """Of the tasks that have a tag."""

    tasks: int
    failed: int
    reward: Estimate


@dataclass(frozen=True)
class Evaluation:
    """Figures of one pass over a data set.

    ``reward`` is the mean over tasks (of each task's mean over its rollouts that have a reward), ``low`` and ``high``
    the ends of its interval, which reach as far as lost rewards could move it; ``failed`` counts the rollouts without
    one. ``annotations`` holds, by key, the mean over all annotated events (not over rollouts).
    """

    tasks: int
    failed: int
    reward: float | None
    turns: float | None
    sampled_tokens: int
    annotations: dict[str, float]
    low: float | None = None
    high: float | None = None
    rollouts: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Rollouts without a reward, by kind of failure."""
    success: Estimate | None = None
    """The share that reaches the threshold."""
    pass_at: dict[str, Estimate] = field(default_factory=dict)
    """By ``k``."""
    tags: dict[str, TagFigures] = field(default_factory=dict)
    seconds: float | None = None
    """A rollout's mean."""
    spend: dict[str, Spend] = field(default_factory=dict)
    """By endpoint."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def evaluate(episodes: Sequence[Episode], scale: Scale | None = None) -> Evaluation:
    """Figures over finished rollouts."""
    return figures_of(plays_of(episodes), scale)


def figures_of(plays: Sequence[Play], scale: Scale | None = None) -> Evaluation:
    """Figures over plays."""
    scale = scale or Scale()
    rewards = list(rewards_by_task(plays, scale.failed_reward).values())
    ended = [play for play in plays if play.failure is None]
    estimate = mean_reward(rewards, scale.confidence)
    return Evaluation(
        tasks=len(rewards),
        failed=len(plays) - len(ended),
        reward=estimate.value,
        turns=mean([play.turns for play in ended]),
        sampled_tokens=sum(play.sampled_tokens for play in plays),
        annotations=mean_annotations(ended),
        low=estimate.low,
        high=estimate.high,
        rollouts=len(plays),
        failures=dict(Counter(play.failure for play in plays if play.failure is not None).most_common()),
        success=pass_at_k(rewards, 1, scale.threshold, scale.confidence),
        pass_at={str(k): pass_at_k(rewards, k, scale.threshold, scale.confidence) for k in scale.pass_at},
        tags=tag_figures(plays, scale),
        seconds=mean([play.seconds for play in ended if play.seconds is not None]),
        spend=spend_of(plays),
    )


def rewards_by_task(plays: Sequence[Play], failed_reward: float | None = None) -> dict[int, list[float | None]]:
    """Of each task those of its rollouts; None where there is none, which is nobody's 0."""
    found: defaultdict[int, list[float | None]] = defaultdict(list)
    for play in plays:
        found[play.task].append(failed_reward if play.failure in AGENT else play.reward)
    return dict(sorted(found.items()))


def tag_figures(plays: Sequence[Play], scale: Scale) -> dict[str, TagFigures]:
    """By tag, of the plays of its tasks."""
    tagged: defaultdict[str, list[Play]] = defaultdict(list)
    for play in plays:
        for tag in play.tags:
            tagged[tag].append(play)
    found = {}
    for tag, theirs in sorted(tagged.items()):
        rewards = list(rewards_by_task(theirs, scale.failed_reward).values())
        failed = sum(play.failure is not None for play in theirs)
        found[tag] = TagFigures(len(rewards), failed, mean_reward(rewards, scale.confidence))
    return found


def mean_annotations(plays: Sequence[Play]) -> dict[str, float]:
    """By key, the mean over all events."""
    events: defaultdict[str, list[float]] = defaultdict(list)
    for play in plays:
        for key, values in play.annotations.items():
            events[key] += values
    return {key: sum(values) / len(values) for key, values in sorted(events.items())}


def spend_of(plays: Sequence[Play]) -> dict[str, Spend]:
    """By endpoint, over all plays."""
    total: defaultdict[str, Spend] = defaultdict(Spend)
    for play in plays:
        for endpoint, spend in play.spend.items():
            total[endpoint].include(spend)
    return dict(total)


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None
