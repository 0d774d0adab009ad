"""The account of a step: every rollout is trained on, or dropped for a reason that a user can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.settings import BatchSettings, GroupPolicy
from lightning_ray.trajectories.usable import Outcome, outcome_of, unusable

__all__ = ["BATCH_SCHEMA", "Account", "batch_of", "settle", "unusable"]

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
"""One row a trajectory, or a call at level ``transition``; the lists are of one length. ``mask`` is 1 where the policy
sampled, on every token in one row at most. ``reward`` is the rollout's, weighted and shaped, and the same in all of its
rows. A rollout's rows lie together, in the order of their first calls."""
STEP_SCHEMA = BATCH_SCHEMA.append(pa.field("step_rewards", pa.list_(pa.float32())))
"""With rewards credited by step. ``step_rewards`` is as long as ``token_ids``: the reward of each call is on its last
sampled token, what shaping takes off is on that of the rollout's last call, and all else is 0."""


@dataclass
class Account:
    """What became of the rollouts of one step. Invariant: len(trained) + len(dropped) = the rollouts given."""

    trained: list[Episode] = field(default_factory=list)
    """Their trajectories are the rows of the batch, their rewards those that are trained on."""
    dropped: dict[str, str] = field(default_factory=dict)
    """rollout id -> reason"""
    details: dict[str, str] = field(default_factory=dict)
    """rollout id -> figures of the reason"""
    resample: list[str] = field(default_factory=list)
    """Groups whose tasks are to be played again; their rollouts are dropped."""
    rows_dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """rollout id -> rows left out by reason, of rollouts that are trained on"""
    rows_truncated: dict[str, int] = field(default_factory=dict)
    """rollout id -> rows that were cut"""
    penalties: dict[str, float] = field(default_factory=dict)
    """rollout id -> what shaping took off the reward, below 0"""

    def add(self, other: Account) -> None:
        """Take over another account, of other rollouts of the same step."""
        self.trained += other.trained
        self.resample += other.resample
        for name in ("dropped", "details", "rows_dropped", "rows_truncated", "penalties"):
            getattr(self, name).update(getattr(other, name))

    def train(self, outcome: Outcome) -> None:
        """Enter a rollout that is trained on."""
        rollout_id = outcome.episode.rollout_id
        self.trained.append(outcome.episode)
        if outcome.rows_dropped:
            self.rows_dropped[rollout_id] = dict(outcome.rows_dropped)
        if outcome.rows_truncated:
            self.rows_truncated[rollout_id] = outcome.rows_truncated
        if outcome.penalty:
            self.penalties[rollout_id] = outcome.penalty

    def drop(self, outcome: Outcome, reason: str, detail: str | None = None) -> None:
        """Enter a rollout that is not."""
        self.dropped[outcome.episode.rollout_id] = reason
        if detail is not None:
            self.details[outcome.episode.rollout_id] = detail

    def drops_by_reason(self) -> dict[str, int]:
        """How many rollouts were dropped for each reason."""
        return dict(Counter(self.dropped.values()))

    def figures(self) -> dict[str, int]:
        """Of the rows: how many there are, were cut, and were left out by reason; and of shaping and resampling."""
        left_out: Counter[str] = Counter()
        for reasons in self.rows_dropped.values():
            left_out.update(reasons)
        return {
            "rows": sum(len(episode.trajectories) for episode in self.trained),
            "rows_truncated": sum(self.rows_truncated.values()),
            **{f"rows_dropped.{reason}": count for reason, count in left_out.items()},
            "rollouts_overlong": len(self.penalties),
            "groups_resampled": len(self.resample),
        }


def settle(
    episodes: Sequence[Episode],
    group_of: Mapping[str, str],
    settings: BatchSettings | None = None,
    oldest_version: int | None = None,
) -> Account:
    """Decide which rollouts are trained on, with which rows and reward.

    Groups need two rollouts, and rewards that differ, unless ``settings.groups`` says otherwise. Failures are no
    rewards: a failed rollout is left out of its group. ``oldest_version`` bounds the weights that sampled a token.
    """
    settings = settings or BatchSettings()
    account = Account()
    groups: dict[str, list[Outcome]] = {}
    for episode in episodes:
        outcome = outcome_of(episode, settings, oldest_version)
        groups.setdefault(group_of[episode.rollout_id], []).append(outcome)
    for group_id, members in groups.items():
        if _settle_group(account, members, settings.groups):
            account.resample.append(group_id)
    ids = {episode.rollout_id for episode in account.trained} | account.dropped.keys()
    assert len(account.trained) + len(account.dropped) == len(ids) == len(episodes), "a rollout counts once"
    return account


def _settle_group(account: Account, members: Sequence[Outcome], policy: GroupPolicy) -> bool:
    """Enter the rollouts of one group; returns whether it is to be played again."""
    usable = []
    for outcome in members:
        if outcome.reason is None:
            usable.append(outcome)
        else:
            account.drop(outcome, outcome.reason, outcome.detail)
    failed = any(outcome.reason == "infrastructure_failure" for outcome in members)
    if failed and policy.infrastructure == "resample":
        for outcome in usable:
            account.drop(outcome, "resampled", "a rollout of its group failed for the infrastructure")
        return True
    reason, detail, choice = None, None, "keep"
    if len(usable) < 2:
        reason, choice = "group_of_one", policy.alone
    elif len(set().union(*(outcome.values for outcome in usable))) == 1:
        reason, detail, choice = "no_variance", f"reward {usable[0].episode.reward:g}", policy.no_variance
    for outcome in usable:
        if reason is None or choice == "keep":
            account.train(outcome)
        else:
            account.drop(outcome, reason, detail)
    return choice == "resample"


def batch_of(episodes: Sequence[Episode], group_of: Mapping[str, str]) -> pa.Table:
    """The training batch of an account's episodes: BATCH_SCHEMA, or STEP_SCHEMA if rewards are credited by step."""
    rows = [(episode, trajectory) for episode in episodes for trajectory in episode.trajectories]
    schema = STEP_SCHEMA if rows and rows[0][1].step_rewards is not None else BATCH_SCHEMA
    lists = {
        field.name: [getattr(trajectory, field.name) for _, trajectory in rows]
        for field in schema
        if pa.types.is_list(field.type)
    }
    columns = {
        "rollout_id": [episode.rollout_id for episode, _ in rows],
        "group_id": [group_of[episode.rollout_id] for episode, _ in rows],
        "reward": [episode.reward for episode, _ in rows],
        **lists,
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
