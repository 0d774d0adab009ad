"""Which rollouts are imitated: the best of their task, above a reward, as a filter has it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_ray as lr
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode, read_episodes
from lightning_ray.trajectories.keeping import keep_best
from lightning_ray.trajectories.settings import BatchSettings, Keep
from tests.test_trajectories import model_call, rollout, table


def played(rewards: dict[str, float | None], **failed: str) -> list[Episode]:
    """A rollout for each reward; those in ``failed`` ended with that status."""
    spans = [model_call(name, [1, 2], [3]) for name in rewards]
    episodes = read_episodes([rollout(name) for name in rewards], table(*spans), dict.fromkeys(rewards, "at-1"))
    for episode in episodes:
        episode.reward = rewards[episode.rollout_id]
        if episode.rollout_id in failed:
            episode.rollout = episode.rollout.model_copy(update={"status": failed[episode.rollout_id]})
    return episodes


def kept(rewards: dict[str, float | None], batch: BatchSettings | None = None, **keep: Any) -> tuple[list[str], dict]:
    """Of tasks named by the first letter."""
    account = account_of(played(rewards), batch, **keep)
    return [episode.rollout_id for episode in account.trained], account.dropped


def account_of(episodes: list[Episode], batch: BatchSettings | None = None, **keep: Any) -> Account:
    return keep_best(episodes, {e.rollout_id: e.rollout_id[0] for e in episodes}, Keep(**keep), batch)


def test_the_top_share_of_each_task_is_kept_the_first_among_equals() -> None:
    rewards: dict[str, float | None] = {"a0": 0.5, "b0": 0.0, "a1": 1.0, "a2": 1.0, "b1": 0.0, "a3": 1.0, "b2": 0.0}
    best, dropped = kept(rewards, top_share=0.5)
    assert best == ["a1", "a2", "b0", "b1"]
    assert dropped == dict.fromkeys(["a0", "a3", "b2"], "not_among_best")
    best, _ = kept(rewards, top_share=0.01)
    assert best == ["a1", "b0"], "at least one of each task"
    assert kept(rewards)[0] == sorted(rewards), "without a choice all of them"


def test_a_threshold_counts_before_the_share() -> None:
    best, dropped = kept({"a0": 0.2, "a1": 1.0, "b0": 0.4, "b1": 0.3}, top_share=0.5, min_reward=0.5)
    assert best == ["a1"] and dropped == dict.fromkeys(["a0", "b0", "b1"], "below_min_reward")
    account = account_of(played({"a0": 0.2}), min_reward=0.5)
    assert account.details == {"a0": "reward 0.2, at least 0.5"}


def test_a_filter_sees_the_episode_and_may_fail() -> None:
    best, dropped = kept({"a0": 0.0, "a1": 1.0}, filter=lambda episode: episode.reward > 0 and episode.calls == 1)
    assert best == ["a1"] and dropped == {"a0": "filtered_out"}
    with pytest.raises(lr.ConfigError, match=r"keep\.filter failed on rollout a0: ZeroDivisionError"):
        kept({"a0": 0.0}, filter=lambda episode: 1 / episode.reward)


def test_a_reward_is_needed_where_one_is_compared() -> None:
    assert kept({"a0": None, "b0": None, "b1": 1.0}, top_share=0.5)[1] == {"b0": "no_reward"}
    account = account_of(played({"a0": None}), filter=lambda episode: True)
    assert [episode.reward for episode in account.trained] == [0.0]


def test_what_fails_or_is_too_long_is_no_example() -> None:
    account = account_of(played({"a0": 1.0, "a1": 1.0}, a0="failed"), BatchSettings())
    assert [e.rollout_id for e in account.trained] == ["a1"] and account.dropped == {"a0": "agent_failed"}
    assert account_of(played({"a0": 1.0}), BatchSettings(max_tokens=2)).dropped == {"a0": "too_long"}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0]) | st.none()), min_size=1),
    st.floats(0.01, 1),
)
def test_nothing_that_is_kept_is_worse_than_what_its_task_left_out(drawn: list[Any], share: float) -> None:
    rewards = {f"{task}{index}": reward for index, (task, reward) in enumerate(drawn)}
    best, dropped = kept(rewards, top_share=share)
    assert {*best} | dropped.keys() == rewards.keys() and not {*best} & dropped.keys()
    for name in best:
        left_out = [rewards[other] for other in dropped if other[0] == name[0] and rewards[other] is not None]
        assert all((rewards[name] or 0.0) >= reward for reward in left_out if reward is not None)
    shuffled = list(rewards.items())
    random.Random(0).shuffle(shuffled)
    again, _ = kept(dict(shuffled), top_share=share)
    assert sorted(rewards[name] or 0.0 for name in again) == sorted(rewards[name] or 0.0 for name in best)
