"""Which rollouts are good enough to imitate: above a reward, by a filter of the user's, the best of their task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_ray.errors import ConfigError
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.settings import BatchSettings, Keep
from lightning_ray.trajectories.usable import Outcome, outcome_of


def keep_best(
    episodes: Sequence[Episode],
    group_of: Mapping[str, str],
    keep: Keep,
    settings: BatchSettings | None = None,
    oldest_version: int | None = None,
) -> Account:
    """The account of rollouts that are trained on if they are usable and ``keep`` holds of them; a group is a task's.

    Raises ConfigError for a filter that fails.
    """
    settings = settings or BatchSettings()
    account = Account()
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(group_of[episode.rollout_id], []).append(episode)
    for members in groups.values():
        rewarded = keep.needs_reward(len(members))
        _keep_of_group(account, [outcome_of(each, settings, oldest_version, rewarded) for each in members], keep)
    ids = {episode.rollout_id for episode in account.trained} | account.dropped.keys()
    assert len(account.trained) + len(account.dropped) == len(ids) == len(episodes), "a rollout counts once"
    return account


def _keep_of_group(account: Account, members: Sequence[Outcome], keep: Keep) -> None:
    good = []
    for outcome in members:
        reason, detail = outcome.reason, outcome.detail
        if reason is None:
            reason, detail = _refusal(outcome, keep)
        if reason is None:
            good.append(outcome)
        else:
            account.drop(outcome, reason, detail)
    count = max(1, math.ceil(keep.top_share * len(members) - 1e-9))
    ranked = sorted(range(len(good)), key=lambda index: -_reward(good[index]))
    best = {*ranked[:count]}
    for index, outcome in enumerate(good):
        if index in best:
            account.train(outcome)
        else:
            account.drop(outcome, "not_among_best", f"reward {_reward(outcome):g}, of {len(members)} {count} are kept")


def _refusal(outcome: Outcome, keep: Keep) -> tuple[str | None, str | None]:
    """Why a usable rollout is not kept, whatever the others of its task."""
    if keep.min_reward is not None and (reward := _reward(outcome)) < keep.min_reward:
        return "below_min_reward", f"reward {reward:g}, at least {keep.min_reward:g}"
    if keep.filter is not None:
        try:
            kept = keep.filter(outcome.episode)
        except Exception as error:
            raise ConfigError(
                f"keep.filter failed on rollout {outcome.episode.rollout_id}: {type(error).__name__}: {error}; it is "
                "called with an episode (reward, annotations, rollout.input, ...) and returns whether to keep it"
            ) from error
        if not kept:
            return "filtered_out", None
    return None, None


def _reward(outcome: Outcome) -> float:
    return outcome.episode.reward or 0.0
