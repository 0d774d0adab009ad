"""A step's batch, rebuilt from the store: the same rollouts in the same order, settled as the run settled them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from lightning_ray.errors import ConfigError
from lightning_ray.recorded import counting_attempts
from lightning_ray.replay.record import StepRecord
from lightning_ray.trajectories.account import Account, batch_of, settle
from lightning_ray.trajectories.episode import Episode, read_episodes
from lightning_ray.trajectories.given import settle_given, with_advantages
from lightning_ray.trajectories.settings import BatchSettings
from lightning_ray.types import Attempt, Rollout


class View(Protocol):
    """What of a store's folder is needed."""

    def query_rollouts(self, where: Mapping[str, Any] | None = None) -> Iterable[Rollout]: ...

    def query_attempts(self, rollout_id: str) -> Iterable[Attempt]: ...

    def scan_spans(self, rollout_ids: Sequence[str]) -> pa.Table: ...


def read_step(
    view: View, record: StepRecord, agent_match: str | None = None, policy: str | None = None
) -> list[Episode]:
    """The step's episodes, in its order. Raises ConfigError if the store lacks one of its rollouts."""
    ids = list(record.group_of)
    found = {rollout.rollout_id: rollout for rollout in view.query_rollouts({"rollout_id_in": ids})}
    lacking = [rollout_id for rollout_id in ids if rollout_id not in found]
    if lacking:
        raise ConfigError(
            f"step {record.step} cannot be replayed: the store lacks {len(lacking)} of its {len(ids)} rollouts, "
            f"{lacking[0]} for one; give the folder of the run that played it"
        )
    spans = view.scan_spans(ids)
    counting = counting_attempts(spans, view.query_attempts)
    return read_episodes([found[each] for each in ids], spans, counting, agent_match, policy)


def settle_again(
    view: View,
    record: StepRecord,
    settings: BatchSettings,
    max_staleness: int,
    agent_match: str | None = None,
    policy: str | None = None,
) -> Account:
    """The step's account under these settings. Nothing is played again that they would have resampled."""
    episodes = read_step(view, record, agent_match, policy)
    oldest = record.version - max_staleness
    if record.advantages:
        return settle_given(episodes, record.advantages, settings, oldest)
    return settle(episodes, record.group_of, settings, oldest)


def rebuild(
    view: View,
    record: StepRecord,
    settings: BatchSettings,
    max_staleness: int,
    agent_match: str | None = None,
    policy: str | None = None,
) -> pa.Table:
    """The step's batch under these settings, of one of several ``policy``. Raises ConfigError if they leave nothing to
    train on.
    """
    account = settle_again(view, record, settings, max_staleness, agent_match, policy)
    if not account.trained:
        raise ConfigError(
            f"step {record.step}: these settings leave none of its {len(record.group_of)} rollouts to train on: "
            f"{account.drops_by_reason()}"
        )
    table = batch_of(account.trained, record.group_of)
    return with_advantages(table, record.advantages) if record.advantages else table
