"""From spans to trajectories, episodes, accounts and batches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.emit import reward_attributes
from lightning_ray.semconv import AGL_ANNOTATION
from lightning_ray.store.lifecycle import Lifecycle
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.trajectories.account import BATCH_SCHEMA, batch_of, settle
from lightning_ray.trajectories.episode import Episode, last_attempts, read_episodes
from lightning_ray.trajectories.join import ModelCall, Trajectory, common_prefix, join_calls
from lightning_ray.trajectories.settings import BatchSettings
from lightning_ray.types import Attempt, EnqueueRolloutRequest, Rollout, RolloutConfig


def call(prompt: list[int], sampled: list[int], version: int = 0) -> ModelCall:
    count = len(sampled)
    return ModelCall(
        np.array(prompt, np.int32),
        np.array(sampled, np.int32),
        -np.arange(1, count + 1, dtype=np.float32),
        np.full(count, version, np.int32),
    )


def tokens(trajectory: Trajectory) -> list[int]:
    return trajectory.token_ids.tolist()


def test_one_call() -> None:
    [t] = join_calls([call([1, 2], [3, 4], version=7)])
    assert tokens(t) == [1, 2, 3, 4]
    assert t.mask.tolist() == [0, 0, 1, 1]
    assert t.logprobs.tolist() == [0, 0, -1, -2]
    assert t.weight_versions.tolist() == [-1, -1, 7, 7]
    assert (t.calls, t.broken_prefix) == (1, None)
    assert [a.dtype for a in (t.token_ids, t.mask, t.logprobs, t.weight_versions)] == [
        np.int32,
        np.int8,
        np.float32,
        np.int32,
    ]


def test_a_prompt_that_extends_what_was_seen_joins_and_the_tools_tokens_are_context() -> None:
    [t] = join_calls([call([1], [2, 3], 0), call([1, 2, 3, 9, 9], [4], 1)])
    assert tokens(t) == [1, 2, 3, 9, 9, 4]
    assert t.mask.tolist() == [0, 1, 1, 0, 0, 1]
    assert t.logprobs.tolist() == [0, -1, -2, 0, 0, -1]
    assert t.weight_versions.tolist() == [-1, 0, 0, -1, -1, 1]
    assert t.calls == 2


def test_a_changed_prefix_starts_a_trajectory_and_tells_where_it_broke() -> None:
    first, second = join_calls([call([1, 2], [3, 4]), call([1, 2, 3, 5, 6], [7])])
    assert (tokens(first), tokens(second)) == ([1, 2, 3, 4], [1, 2, 3, 5, 6, 7])
    assert (first.broken_prefix, second.broken_prefix) == (None, 3)
    assert second.mask.tolist() == [0, 0, 0, 0, 0, 1]


def test_a_prompt_that_ends_inside_what_was_seen_does_not_join() -> None:
    first, second = join_calls([call([1], [2, 3]), call([1, 2], [3])])
    assert (tokens(first), tokens(second)) == ([1, 2, 3], [1, 2, 3]) and second.broken_prefix == 2


def test_branches_are_each_continued() -> None:
    a, b = join_calls([call([1], [2]), call([1], [5]), call([1, 5, 9], [6]), call([1, 2, 9], [3])])
    assert (tokens(a), tokens(b)) == ([1, 2, 9, 3], [1, 5, 9, 6])


def test_identical_calls_in_parallel_are_two_trajectories() -> None:
    a, b = join_calls([call([1, 2], [3]), call([1, 2], [3])])
    assert tokens(a) == tokens(b) == [1, 2, 3] and (a.calls, b.calls) == (1, 1)


def test_the_longest_of_several_prefixes_is_extended() -> None:
    short, long = join_calls([call([1], []), call([7], [8]), call([7, 8, 1], [2])])
    assert (tokens(short), tokens(long)) == ([1], [7, 8, 1, 2])
    [a, b] = join_calls([call([1], [2]), call([1], [2, 3]), call([1, 2, 3, 4], [5])])
    assert (tokens(a), tokens(b)) == ([1, 2], [1, 2, 3, 4, 5])


def test_common_prefix() -> None:
    for a, b, expected in (([], [1], 0), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([5], [5], 1), ([1], [2], 0)):
        assert common_prefix(np.array(a), np.array(b)) == expected


ids = st.lists(st.integers(0, 2), max_size=4)


@st.composite
def conversations(draw: Any) -> list[ModelCall]:
    """Calls whose prompts extend an earlier call, or are anything; few distinct tokens, so that prefixes collide."""
    calls: list[ModelCall] = []
    for number in range(draw(st.integers(1, 6))):
        prompt = draw(ids)
        if calls and draw(st.booleans()):
            before = draw(st.sampled_from(calls))
            prompt = [*before.prompt_ids.tolist(), *before.sampled_ids.tolist(), *prompt]
        calls.append(call(prompt, draw(ids), version=number))
    return calls


@given(conversations())
def test_every_call_is_found_whole_in_one_trajectory(calls: list[ModelCall]) -> None:
    trajectories = join_calls(calls)
    assert sum(t.calls for t in trajectories) == len(calls)
    for number, made in enumerate(calls):
        whole = np.concatenate([made.prompt_ids, made.sampled_ids])
        if len(made.sampled_ids) == 0:
            continue
        [t] = [t for t in trajectories if number in t.weight_versions]
        mine = np.nonzero(t.weight_versions == number)[0]
        end = mine[-1] + 1
        assert np.array_equal(t.token_ids[:end], whole)
        assert mine.tolist() == list(range(end - len(made.sampled_ids), end))
        assert np.array_equal(t.logprobs[mine], made.logprobs)
    for t in trajectories:
        assert np.array_equal(t.mask == 1, t.weight_versions >= 0) and set(t.mask.tolist()) <= {0, 1}
        assert not t.logprobs[t.mask == 0].any()
        assert len(t.token_ids) == len(t.mask) == len(t.logprobs) == len(t.weight_versions)
    assert sum(int(t.mask.sum()) for t in trajectories) == sum(len(c.sampled_ids) for c in calls)


# From the store's spans


serial = itertools.count()


def span(rollout_id: str, attempt_id: str = "at-1", **fields: Any) -> dict[str, Any]:
    return {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence_id": 0,
        "trace_id": "t",
        "span_id": str(next(serial)),
        "name": AGL_ANNOTATION,
        **fields,
    }


def model_call(rollout_id: str, prompt: list[int], sampled: list[int], attempt_id: str = "at-1") -> dict[str, Any]:
    return span(
        rollout_id,
        attempt_id,
        name="openai.chat.completion",
        status="OK",
        prompt_ids=prompt,
        sampled_ids=sampled,
        logprobs=[-0.5] * len(sampled),
        weight_versions=[2] * len(sampled),
        finish_reason="stop",
    )


def rollout(rollout_id: str, status: Any = "succeeded", **metadata: Any) -> Rollout:
    return Rollout(rollout_id=rollout_id, input={}, start_time=0.0, status=status, metadata=metadata or None)


def table(*spans: dict[str, Any]) -> pa.Table:
    """As a store gives it: several batches."""
    return pa.Table.from_batches([spans_to_batch([one]) for one in spans])


def test_an_episode_is_read_back_from_its_spans() -> None:
    spans = table(
        model_call("ro-1", [1, 2], [3]),
        model_call("ro-2", [5], [6, 7]),
        span("ro-1", attributes={"valid_sql": True, "turns": 2, "note": "text"}),
        model_call("ro-1", [1, 2, 3, 9], [4]),
        span("ro-1", attributes={"valid_sql": False}),
        span("ro-1", name="agentlightning.exception", attributes={"turns": 99}),
        span("ro-1", attributes=reward_attributes(0.25)),
    )
    one, two = read_episodes([rollout("ro-1"), rollout("ro-2")], spans, {"ro-1": "at-1", "ro-2": "at-1"})
    assert (one.rollout_id, one.calls, one.sampled_tokens, one.reward) == ("ro-1", 2, 2, 0.25)
    [t] = one.trajectories
    assert (tokens(t), t.mask.tolist()) == ([1, 2, 3, 9, 4], [0, 0, 1, 0, 1])
    assert t.weight_versions.tolist() == [-1, -1, 2, -1, 2] and t.logprobs.tolist() == [0, 0, -0.5, 0, -0.5]
    assert one.annotations == {"valid_sql": [1.0, 0.0], "turns": [2.0]}
    assert (two.calls, two.sampled_tokens, two.reward, two.annotations) == (1, 2, None, {})


def test_the_last_primary_reward_counts() -> None:
    spans = table(
        span("ro-1", attributes=reward_attributes(0.1)),
        span("ro-1", attributes=reward_attributes({"style": 5.0, "answer": 0.75}, "answer")),
    )
    [episode] = read_episodes([rollout("ro-1")], spans, {"ro-1": "at-1"})
    assert episode.reward == 0.75


def test_a_call_that_was_broken_off_does_not_count() -> None:
    spans = table(
        model_call("ro-1", [1, 2], [3]) | {"status": "ERROR", "finish_reason": "abort"},
        model_call("ro-1", [1, 2], [4]),
    )
    [episode] = read_episodes([rollout("ro-1")], spans, {"ro-1": "at-1"})
    assert episode.calls == 1 and tokens(episode.trajectories[0]) == [1, 2, 4]


def test_only_the_attempt_that_counts_is_read() -> None:
    spans = table(
        model_call("ro-1", [1], [2, 3], "at-1"),
        span("ro-1", "at-1", attributes=reward_attributes(1.0)),
        model_call("ro-1", [1], [4], "at-2"),
        span("ro-1", "at-2", attributes=reward_attributes(0.0)),
    )
    attempts = [
        Attempt(rollout_id="ro-1", attempt_id=name, sequence_id=number, start_time=0.0)
        for name, number in (("at-2", 2), ("at-1", 1))
    ]
    [episode] = read_episodes([rollout("ro-1")], spans, last_attempts(attempts))
    assert (episode.reward, episode.sampled_tokens, tokens(episode.trajectories[0])) == (0.0, 1, [1, 4])


def test_rollouts_without_spans_are_episodes_too() -> None:
    [episode] = read_episodes([rollout("ro-1", "failed")], table(span("ro-2")), {})
    assert (episode.calls, episode.trajectories, episode.reward) == (0, [], None)


# Settling


def episode(
    rollout_id: str,
    reward: float | None = 0.0,
    status: str = "succeeded",
    sampled: int = 1,
    calls: int = 1,
    **metadata: Any,
) -> Episode:
    trajectories = join_calls([call([1, 2], [3] * sampled)]) if calls else []
    return Episode(rollout(rollout_id, status, **metadata), trajectories, reward, {}, calls, sampled * calls)


def dropped(*episodes: Episode, max_tokens: int | None = None) -> dict[str, str]:
    """Reasons, all episodes being of one group with two good ones."""
    everyone = [*episodes, episode("good-0", 0.0), episode("good-1", 1.0)]
    account = settle(everyone, {e.rollout_id: "gr" for e in everyone}, BatchSettings(max_tokens=max_tokens))
    assert [e.rollout_id for e in account.trained][-2:] == ["good-0", "good-1"]
    assert len(account.trained) + len(account.dropped) == len(everyone)
    return account.dropped


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (episode("x", status="cancelled"), "cancelled"),
        (episode("x", status="failed", failure={"kind": "infrastructure", "reason": "gone"}), "infrastructure_failure"),
        (episode("x", status="failed", failure={"kind": "timeout", "reason": "slow"}), "timed_out"),
        (episode("x", status="failed", failure={"kind": "unresponsive", "reason": None}), "unresponsive"),
        (episode("x", status="failed", failure={"kind": "failed", "reason": "ValueError"}), "agent_failed"),
        (episode("x", status="failed"), "agent_failed"),
        (episode("x", calls=0), "no_model_call"),
        (episode("x", sampled=0), "no_sampled_token"),
        (episode("x", None), "no_reward"),
        (episode("x", float("nan")), "reward_not_finite"),
        (episode("x", float("inf")), "reward_not_finite"),
    ],
)
def test_what_cannot_be_trained_on_is_dropped_by_name(bad: Episode, reason: str) -> None:
    assert dropped(bad) == {"x": reason}


def test_the_reasons_are_those_that_the_store_gives() -> None:
    """The same through the store's own state machine, so that the names cannot drift apart."""
    kinds: dict[str, list[tuple[str, Any]]] = {
        "infrastructure_failure": 6 * [("failed", {"infrastructure": True})],
        "timed_out": [("timeout", None)],
        "unresponsive": [("unresponsive", None)],
        "agent_failed": [("failed", None)],
    }
    for reason, ends in kinds.items():
        lifecycle = Lifecycle()
        lifecycle.enqueue([EnqueueRolloutRequest(input={}, rollout_id="x", config=RolloutConfig())], 0.0)
        for status, metadata in ends:
            [lease] = lifecycle.dequeue(1, "w", None, 0.0)
            lifecycle.finish([("x", lease.attempt.attempt_id, status, metadata)], 0.0)
        ended = Episode(lifecycle.rollout("x"), calls=1)
        assert ended.rollout.status == "failed" and dropped(ended) == {"x": reason}


def test_a_trajectory_that_is_too_long_is_dropped() -> None:
    assert dropped(episode("x", 0.5, sampled=4), max_tokens=5) == {"x": "too_long"}
    assert dropped(episode("x", 0.5, sampled=3), max_tokens=5) == {}


def test_groups_need_two_members_and_rewards_that_differ() -> None:
    episodes = [
        episode("a0", 1.0),
        episode("a1", 1.0),
        episode("b0", 1.0),
        episode("c0", 0.0),
        episode("c1", 1.0),
        episode("c2", 0.0, "failed"),
    ]
    account = settle(episodes, {e.rollout_id: e.rollout_id[0] for e in episodes})
    assert [e.rollout_id for e in account.trained] == ["c0", "c1"]
    assert account.dropped == {"a0": "no_variance", "a1": "no_variance", "b0": "group_of_one", "c2": "agent_failed"}
    assert account.drops_by_reason() == {"no_variance": 2, "group_of_one": 1, "agent_failed": 1}


def test_a_failure_is_no_reward_of_zero() -> None:
    """One that succeeded and one that failed are no group: nothing is learned from the difference."""
    account = settle([episode("a", 1.0), episode("b", 0.0, "failed")], {"a": "g", "b": "g"})
    assert not account.trained and account.dropped == {"a": "group_of_one", "b": "agent_failed"}


def test_the_batch_has_a_row_for_each_trajectory() -> None:
    branched = Episode(rollout("a"), join_calls([call([1], [2, 3], 4), call([9], [8], 5)]), 1.0, {}, 2, 3)
    batch = batch_of([branched, episode("b", 0.5)], {"a": "ga", "b": "gb"})
    assert batch.schema == BATCH_SCHEMA
    assert batch.to_pylist() == [
        {
            "rollout_id": "a",
            "group_id": "ga",
            "token_ids": [1, 2, 3],
            "mask": [0, 1, 1],
            "logprobs": [0.0, -1.0, -2.0],
            "weight_versions": [-1, 4, 4],
            "reward": 1.0,
        },
        {
            "rollout_id": "a",
            "group_id": "ga",
            "token_ids": [9, 8],
            "mask": [0, 1],
            "logprobs": [0.0, -1.0],
            "weight_versions": [-1, 5],
            "reward": 1.0,
        },
        {
            "rollout_id": "b",
            "group_id": "gb",
            "token_ids": [1, 2, 3],
            "mask": [0, 0, 1],
            "logprobs": [0.0, 0.0, -1.0],
            "weight_versions": [-1, -1, 0],
            "reward": 0.5,
        },
    ]
    assert batch_of([], {}).schema == BATCH_SCHEMA
