"""The account of rollouts to which an algorithm of one's own gave advantages: trained on if they are usable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyarrow as pa

from lightning_ray.errors import ConfigError
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.settings import BatchSettings
from lightning_ray.trajectories.usable import outcome_of

ADVANTAGE = "advantage"
NOT_CHOSEN = "not_chosen"


def settle_given(
    episodes: Sequence[Episode],
    advantages: Mapping[str, float],
    settings: BatchSettings | None = None,
    oldest_version: int | None = None,
) -> Account:
    """Which rollouts are trained on: those with an advantage that are usable. The others were not chosen, unless they
    could not have been. Raises ConfigError for an advantage that is not finite.
    """
    account = Account()
    for episode in episodes:
        outcome = outcome_of(episode, settings or BatchSettings(), oldest_version)
        advantage = advantages.get(episode.rollout_id)
        if advantage is not None and not math.isfinite(advantage):
            raise ConfigError(f"rollout {episode.rollout_id} got the advantage {advantage}: give a finite number")
        if outcome.reason is not None:
            account.drop(outcome, outcome.reason, outcome.detail)
        elif advantage is None:
            account.drop(outcome, NOT_CHOSEN)
        else:
            account.train(outcome)
    return account


def with_advantages(batch: pa.Table, advantages: Mapping[str, float]) -> pa.Table:
    """The batch with each row's advantage, that of its rollout."""
    column = [float(advantages[rollout_id]) for rollout_id in batch["rollout_id"].to_pylist()]
    return batch.append_column(ADVANTAGE, pa.array(column, pa.float32()))
