"""The account of a step: every rollout is trained on, or dropped for a reason that a user can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from lightning_ray.trajectories.episode import Episode

BATCH_SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("group_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.int8())),
        ("logprobs", pa.list_(pa.float32())),
        ("weight_versions", pa.list_(pa.int32())),
        ("reward", pa.float32()),
    ]
)
"""One row a trajectory; the four lists are of one length. ``mask`` is 1 where the policy sampled."""


@dataclass
class Account:
    """What became of the rollouts of one step. Invariant: len(trained) + len(dropped) = the rollouts given."""

    trained: list[Episode] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """rollout id -> reason"""

    def drops_by_reason(self) -> dict[str, int]:
        """How many rollouts were dropped for each reason."""
        return dict(Counter(self.dropped.values()))


def settle(
    episodes: Sequence[Episode],
    group_of: dict[str, str],
    max_tokens: int | None = None,
    oldest_version: int | None = None,
) -> Account:
    """Decide which rollouts are trained on; groups need two of them, and rewards that differ.

    Failures are no rewards: a failed rollout is left out of its group. ``max_tokens`` bounds a trajectory,
    ``oldest_version`` the weights that sampled it.
    """
    account = Account()
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        reason = unusable(episode, max_tokens, oldest_version)
        if reason is None:
            groups.setdefault(group_of[episode.rollout_id], []).append(episode)
        else:
            account.dropped[episode.rollout_id] = reason
    for members in groups.values():
        reason = None
        if len(members) < 2:
            reason = "group_of_one"
        elif len({episode.reward for episode in members}) == 1:
            reason = "no_variance"
        if reason is None:
            account.trained += members
        else:
            account.dropped.update({episode.rollout_id: reason for episode in members})
    return account


FAILURES = {
    "infrastructure": "infrastructure_failure",
    "timeout": "timed_out",
    "unresponsive": "unresponsive",
}
"""Reasons by the kind of failure that the store tells; any other failure is the agent's own."""


def unusable(episode: Episode, max_tokens: int | None = None, oldest_version: int | None = None) -> str | None:
    """Why a rollout cannot be trained on, whatever its group; None if it can."""
    if episode.rollout.status == "cancelled":
        return "cancelled"
    if episode.rollout.status != "succeeded":
        failure = (episode.rollout.metadata or {}).get("failure") or {}
        return FAILURES.get(str(failure.get("kind")), "agent_failed")
    if not episode.calls:
        return "no_model_call"
    if not episode.trajectories:
        return "no_call_of_agent"
    if not episode.sampled_tokens:
        return "no_sampled_token"
    if episode.reward is None:
        return "no_reward"
    if not np.isfinite(episode.reward):
        return "reward_not_finite"
    if max_tokens is not None and max(len(t.token_ids) for t in episode.trajectories) > max_tokens:
        return "too_long"
    if oldest_version is not None and any(
        t.weight_versions[t.mask == 1].min(initial=oldest_version) < oldest_version for t in episode.trajectories
    ):
        return "too_stale"
    return None


def batch_of(episodes: Sequence[Episode], group_of: dict[str, str]) -> pa.Table:
    """The training batch (BATCH_SCHEMA) of the episodes' trajectories."""
    rows = [(episode, trajectory) for episode in episodes for trajectory in episode.trajectories]
    lists = [
        [getattr(trajectory, name) for _, trajectory in rows]
        for name in ("token_ids", "mask", "logprobs", "weight_versions")
    ]
    columns = [
        [episode.rollout_id for episode, _ in rows],
        [group_of[episode.rollout_id] for episode, _ in rows],
        *lists,
        [episode.reward for episode, _ in rows],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, BATCH_SCHEMA, strict=True)], schema=BATCH_SCHEMA)
