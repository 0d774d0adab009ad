"""The figures of one training step: a flat row of numbers by name, made of what was played, trained and swapped.

Lengths are in tokens, times in seconds unless the name says otherwise. ``update.*`` are the trainer's
(``policy.figures``, ``policy.staleness``): entropy, divergence, clip share, importance weights, gap to the engine,
staleness, gradient norm. A figure that there is nothing to make of is None, or left out where its name is not fixed.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.policy.swap import Swap
from lightning_ray.run.phases import shares
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step."""

    playing: float
    """In which its rollouts were played: until the last of them had ended, or the whole step if they are played
    while the policy is trained."""
    whole: float
    phases: Mapping[str, float] = field(default_factory=dict)
    """Since the row before, by phase; what lies between two steps (validation, checkpoint) included."""


def step_figures(
    step: int, episodes: Sequence[Episode], times: StepTimes, agents: Mapping[str, Collection[str]]
) -> dict[str, Any]:
    """What of a step's row in metrics.jsonl is no policy's own. ``agents`` names, by rollout, those that took part."""
    calls = [episode.calls for episode in episodes]
    return {
        "kind": "train",
        "step": step,
        **reward_figures({episode.rollout_id: episode.outcome for episode in episodes}, agents),
        "turns": mean(calls),
        "turns_max": max(calls, default=None),
        "rollouts": len(episodes),
        "seconds": times.whole,
        "sample_seconds": times.playing,
        **time_figures(times.phases),
    }


def policy_figures(
    episodes: Sequence[Episode], account: Account, update: Mapping[str, Any], swap: Swap | None, times: StepTimes
) -> dict[str, Any]:
    """What is a policy's own: its reward, its calls in the episodes, and what it was trained on."""
    sampled = sum(episode.sampled_tokens for episode in episodes)
    return {
        **reward_figures({episode.rollout_id: episode.reward for episode in episodes}),
        **rollout_figures(episodes, account),
        **length_figures(episodes),
        "sampled_tokens": sampled,
        "sampled_tokens_per_s": sampled / times.playing if times.playing > 0 else 0.0,
        "trained_tokens_per_s": update["trained_tokens"] / update["seconds"] if update else 0.0,
        **swap_figures(swap),
        **{f"update.{name}": value for name, value in update.items()},
    }


def reward_figures(
    found: Mapping[str, float | None], agents: Mapping[str, Collection[str]] | None = None
) -> dict[str, float | None]:
    """Mean and standard deviation over the rollouts (by id) with a finite reward, and where several agents are named
    ``reward_by_agent.NAME``: the mean over the rollouts in which that agent took part.
    """
    rewards = {name: reward for name, reward in found.items() if reward is not None and math.isfinite(reward)}
    figures: dict[str, float | None] = {
        "reward": statistics.fmean(rewards.values()) if rewards else None,
        "reward_std": statistics.pstdev(rewards.values()) if rewards else None,
    }
    by_agent: dict[str, list[float]] = defaultdict(list)
    for rollout_id, reward in rewards.items():
        for name in (agents or {}).get(rollout_id, ()):
            by_agent[name].append(reward)
    if len(by_agent) > 1:
        figures |= {f"reward_by_agent.{name}": statistics.fmean(by_agent[name]) for name in sorted(by_agent)}
    return figures


def rollout_figures(episodes: Sequence[Episode], account: Account) -> dict[str, float | None]:
    """Counts of rollouts, those dropped by reason, and of rows."""
    return {
        "rollouts_trained": len(account.trained),
        **{f"dropped.{reason}": count for reason, count in account.drops_by_reason().items()},
        **account.figures(),
        "trajectories_per_rollout": mean([len(episode.trajectories) for episode in episodes]),
    }


def length_figures(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """Mean and maximum over the trajectories: of the first prompt, of the response (all that follows it, prompts in
    between included), and of the whole.
    """
    rows = [trajectory for episode in episodes for trajectory in episode.trajectories]
    lengths = {
        "prompt": [row.prompt_length for row in rows],
        "response": [len(row.token_ids) - row.prompt_length for row in rows],
        "trajectory": [len(row.token_ids) for row in rows],
    }
    found: dict[str, float | None] = {}
    for name, tokens in lengths.items():
        found |= {f"{name}_tokens_mean": mean(tokens), f"{name}_tokens_max": max(tokens, default=None)}
    return found


def swap_figures(swap: Swap | None) -> dict[str, float | None]:
    """Milliseconds from start to proof and, where the replicas tell, bytes that each got (with LoRA, of the adapter),
    10^9 of them in a second, and the milliseconds of each part, ``swap_ms.NAME``.
    """
    if swap is None:
        return {"swap_ms": None}
    found: dict[str, float | None] = {"swap_ms": swap.seconds * 1e3}
    if swap.bytes is not None and swap.seconds > 0:
        found["swap_bytes"] = swap.bytes
        found["swap_gb_per_s"] = swap.bytes / swap.seconds / 1e9
    if swap.compared is not None:
        found["swap_compared"] = swap.compared
    return found | {f"swap_ms.{name}": seconds * 1e3 for name, seconds in swap.phases.items()}


def time_figures(phases: Mapping[str, float]) -> dict[str, float]:
    """``wall_seconds`` since the row before, and of these the share of each phase, ``time.NAME``."""
    return {"wall_seconds": sum(phases.values()), **{f"time.{name}": share for name, share in shares(phases).items()}}


def agents_of(spans: pa.Table, attempts: Mapping[str, str]) -> dict[str, set[str]]:
    """By rollout, the names of the agents that made a model call in the attempt that counts."""
    named = pc.and_(pc.is_valid(spans["agent"]), pc.is_valid(spans["prompt_ids"]))
    calls = spans.select(["rollout_id", "attempt_id", "agent"]).filter(named)
    found: dict[str, set[str]] = defaultdict(set)
    for rollout_id, attempt_id, agent in zip(*(column.to_pylist() for column in calls.columns), strict=True):
        if attempts.get(rollout_id) == attempt_id:
            found[rollout_id].add(agent)
    return dict(found)


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return statistics.fmean(values) if values else None
