"""What one rollout gives, whatever its group: its rows and reward as they are trained on, or why there are none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.join import Trajectory
from lightning_ray.trajectories.rewards import final_reward, missing_dimensions
from lightning_ray.trajectories.rows import at_level, within_limits
from lightning_ray.trajectories.settings import BatchSettings
from lightning_ray.trajectories.shaping import overlong_penalty
from lightning_ray.trajectories.steps import step_rewards

FAILURES = {
    "infrastructure": "infrastructure_failure",
    "timeout": "timed_out",
    "unresponsive": "unresponsive",
}
"""Reasons by the kind of failure that the store tells; any other failure is the agent's own."""


@dataclass(frozen=True)
class Outcome:
    """One of ``reason`` and a usable ``episode``."""

    episode: Episode
    """Where usable: its trajectories are the rows of the batch, its reward is weighted and shaped."""
    reason: str | None = None
    detail: str | None = None
    rows_dropped: Counter[str] = field(default_factory=Counter)
    rows_truncated: int = 0
    penalty: float = 0.0
    """What shaping added to the reward."""

    @property
    def values(self) -> set[float]:
        """The rewards that are compared within the group: the rollout's, or those of its calls."""
        rows = self.episode.trajectories
        steps = {
            float(row.step_rewards[turn.end - 1])
            for row in rows
            if row.step_rewards is not None
            for turn in row.turns
            if turn.end > turn.start
        }
        return steps or {float(self.episode.reward or 0.0)}


def outcome_of(
    episode: Episode, settings: BatchSettings, oldest_version: int | None = None, rewarded: bool = True
) -> Outcome:
    """Judge one rollout. ``oldest_version`` bounds the weights that sampled it; one without a reward is of use if it
    need not be ``rewarded``, and has a reward of 0 then.
    """
    reason = _failure(episode, settings) or _nothing_sampled(episode)
    if reason is not None:
        return Outcome(episode, reason)
    reward = final_reward(episode.rewards, settings.reward_weights) if settings.reward_weights else episode.reward
    if reward is None and rewarded:
        missing = missing_dimensions(episode.rewards, settings.reward_weights)
        lack = f"lacks {', '.join(map(repr, missing))}" if missing else f"{episode.calls} model calls"
        return Outcome(episode, "no_reward", lack)
    reward = reward or 0.0
    rows = at_level(episode.trajectories, settings.level)
    longest = max(len(row.token_ids) - row.prompt_length for row in rows)
    penalty = overlong_penalty(longest, settings.overlong) if settings.overlong else 0.0
    steps = _steps(episode, settings) if settings.credit == "step" else None
    if not np.isfinite([reward, *(steps or {}).values()]).all():
        return Outcome(episode, "reward_not_finite", f"reward {reward}")
    limited = within_limits(rows, settings)
    if limited.refusal is not None:
        return Outcome(episode, *limited.refusal)
    if oldest_version is not None and (oldest := _oldest(limited.kept)) < oldest_version:
        return Outcome(episode, "too_stale", f"version {oldest}, at least {oldest_version}")
    if steps is not None:
        limited.kept = _with_steps(limited.kept, episode.call_ids, steps, penalty)
    usable = replace(
        episode,
        trajectories=limited.kept,
        reward=reward + penalty,
        sampled_tokens=sum(int(row.mask.sum()) for row in limited.kept),
    )
    return Outcome(usable, None, None, limited.dropped, limited.truncated, penalty)


def unusable(episode: Episode, settings: BatchSettings | None = None, oldest_version: int | None = None) -> str | None:
    """Why a rollout cannot be trained on, whatever its group; None if it can."""
    return outcome_of(episode, settings or BatchSettings(), oldest_version).reason


def _failure(episode: Episode, settings: BatchSettings) -> str | None:
    status = episode.rollout.status
    if status == "succeeded":
        return None
    if status == "cancelled":
        return "cancelled"
    failure = (episode.rollout.metadata or {}).get("failure") or {}
    reason = FAILURES.get(str(failure.get("kind")), "agent_failed")
    kept = reason == "infrastructure_failure" and settings.groups.infrastructure == "keep"
    return None if kept and episode.sampled_tokens and episode.reward is not None else reason


def _nothing_sampled(episode: Episode) -> str | None:
    if not episode.calls:
        return "no_model_call"
    if not episode.trajectories:
        return "no_call_of_agent"
    return None if episode.sampled_tokens else "no_sampled_token"


def _oldest(rows: list[Trajectory]) -> int:
    return min(int(row.weight_versions[row.mask == 1].min()) for row in rows)


def _steps(episode: Episode, settings: BatchSettings) -> dict[str, float]:
    """Rewards by span id, of the calls that sampled: only they have a token for it."""
    calls = {episode.call_ids[turn.call] for row in episode.trajectories for turn in row.turns if turn.end > turn.start}
    weights = settings.reward_weights or episode.own_weights
    return step_rewards(episode.places, episode.rewards, calls, settings.reward_match, weights)


def _with_steps(
    rows: list[Trajectory], call_ids: list[str], steps: dict[str, float], penalty: float
) -> list[Trajectory]:
    """Each call's reward on its last sampled token; the penalty on the rollout's last."""
    last = max(turn.call for row in rows for turn in row.turns if turn.end > turn.start)
    found = []
    for row in rows:
        values = np.zeros(len(row.token_ids), np.float32)
        for turn in row.turns:
            if turn.end > turn.start:
                values[turn.end - 1] = steps.get(call_ids[turn.call], 0.0) + penalty * (turn.call == last)
        found.append(replace(row, step_rewards=values))
    return found
