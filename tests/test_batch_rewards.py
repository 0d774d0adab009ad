"""What is trained on of the rewards: dimensions and weights, rewards of single calls, shaping."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_ray as lr
from lightning_ray.emit import reward_attributes
from lightning_ray.trajectories.account import BATCH_SCHEMA, STEP_SCHEMA, batch_of, settle
from lightning_ray.trajectories.episode import Episode, read_episodes
from lightning_ray.trajectories.settings import BatchSettings, OverlongPenalty
from lightning_ray.trajectories.shaping import overlong_penalty
from lightning_ray.trajectories.usable import Outcome, outcome_of
from tests.test_trajectories import model_call, rollout, span, table

Row = dict[str, Any]


def at(row: Row, start: float, end: float | None = None, **more: Any) -> Row:
    return {**row, "start_time": start, "end_time": start if end is None else end, **more}


def asked(prompt: list[int], sampled: list[int], start: float, end: float | None = None, **more: Any) -> Row:
    return at(model_call("ro", prompt, sampled), start, start + 0.5 if end is None else end, **more)


def reward(value: Any, start: float, primary: str | None = None, **more: Any) -> Row:
    return at(span("ro", attributes=reward_attributes(value, primary), **more), start)


def read(*spans: Row, agent_match: str | None = None) -> Episode:
    [episode] = read_episodes([rollout("ro")], table(*spans), {"ro": "at-1"}, agent_match)
    return episode


def outcome(*spans: Row, agent_match: str | None = None, **settings: Any) -> Outcome:
    return outcome_of(read(*spans, agent_match=agent_match), BatchSettings(**settings))


def steps(*spans: Row, agent_match: str | None = None, **settings: Any) -> list[list[float]]:
    """Step rewards of each row."""
    found = outcome(*spans, agent_match=agent_match, credit="step", **settings)
    assert found.reason is None
    rows = [row.step_rewards for row in found.episode.trajectories]
    return [row.tolist() for row in rows if row is not None]


FIRST, SECOND = asked([1], [2, 3], 1.0), asked([1, 2, 3, 9], [4, 5], 3.0)

# Dimensions


def test_without_weights_the_last_primary_dimension_counts() -> None:
    spans = (FIRST, reward(0.1, 2.0), reward({"style": 5.0, "answer": 0.75}, 3.0, "answer"))
    assert outcome(*spans).episode.reward == 0.75
    assert [each.values for each in read(*spans).rewards] == [{"primary": 0.1}, {"answer": 0.75, "style": 5.0}]


def test_dimensions_are_weighted_by_name_each_by_its_last_value() -> None:
    spans = (
        FIRST,
        reward({"correct": 0.0, "short": 0.5}, 2.0, "correct"),
        reward({"correct": 1.0, "polite": 9.0}, 3.0, "correct"),
    )
    assert outcome(*spans, reward_weights={"correct": 1.0, "short": 0.1}).episode.reward == pytest.approx(1.05)
    assert outcome(*spans, reward_weights={"short": -2.0}).episode.reward == -1.0
    assert outcome(FIRST, reward(0.5, 2.0), reward_weights={"primary": 2.0}).episode.reward == 1.0


def test_a_missing_dimension_is_named() -> None:
    spans = (FIRST, reward({"correct": 1.0, "short": 0.5}, 2.0, "correct"))
    found = outcome(*spans, reward_weights={"correct": 1.0, "kind": 1.0, "brief": 1.0})
    assert (found.reason, found.detail) == ("no_reward", "lacks 'brief', 'kind'")
    assert outcome(FIRST).reason == "no_reward" and outcome(FIRST).detail == "1 model calls"
    assert outcome(FIRST, reward_weights={"x": 1.0}).detail == "lacks 'x'"


def test_a_reward_that_is_no_finite_number_drops_the_rollout() -> None:
    def told(value: float, name: str = "a") -> Row:
        attributes = {"agentlightning.reward.0.name": name, "agentlightning.reward.0.value": value}
        return at(span("ro", attributes=attributes), 2.0)

    assert outcome(FIRST, told(math.inf)).reason == "reward_not_finite"
    assert outcome(FIRST, told(math.nan), reward(1.0, 4.0)).reason is None
    assert outcome(FIRST, told(math.nan), reward(1.0, 4.0), credit="step").reason == "reward_not_finite"
    assert outcome(FIRST, told(math.inf), reward(1.0, 4.0), reward_weights={"a": 1.0}).reason == "reward_not_finite"


# Steps


def test_a_reward_between_calls_belongs_to_the_call_before_it() -> None:
    assert steps(FIRST, reward(0.25, 2.0), SECOND, reward(1.0, 4.0)) == [[0, 0, 0.25, 0, 0, 1.0]]
    assert steps(FIRST, SECOND, reward(1.0, 4.0)) == [[0, 0, 0, 0, 0, 1.0]]


def test_a_reward_goes_to_the_latest_call_that_has_ended_without_one() -> None:
    assert steps(FIRST, SECOND, reward(1.0, 4.0), reward(0.5, 5.0), reward(9.0, 6.0)) == [[0, 0, 0.5, 0, 0, 1.0]]
    slow = asked([1, 2, 3, 9], [4, 5], 3.0, end=9.0)
    assert steps(FIRST, slow, reward(0.5, 5.0), reward(1.0, 10.0)) == [[0, 0, 0.5, 0, 0, 1.0]]


def test_the_reward_of_a_call_is_on_its_row_at_level_transition() -> None:
    spans = (FIRST, reward(0.25, 2.0), SECOND, reward(1.0, 4.0))
    assert steps(*spans, level="transition") == [[0, 0, 0.25], [0, 0, 0, 0, 0, 1.0]]


def test_a_call_that_sampled_nothing_takes_no_reward() -> None:
    empty = asked([1, 2, 3, 9], [], 3.0)
    assert steps(FIRST, empty, reward(1.0, 4.0)) == [[0, 0, 1.0, 0]]


def test_steps_are_weighted_by_the_dimensions_they_have() -> None:
    spans = (
        FIRST,
        reward({"short": 0.5, "other": 7.0}, 2.0, "other"),
        SECOND,
        reward({"correct": 1.0}, 4.0, "correct"),
    )
    found = outcome(*spans, credit="step", reward_weights={"correct": 1.0, "short": 0.5})
    [row] = found.episode.trajectories
    assert row.step_rewards is not None and row.step_rewards.tolist() == [0, 0, 0.25, 0, 0, 1.0]
    assert found.episode.reward == 1.25
    assert row.step_rewards.dtype == np.float32


def test_rewards_of_other_agents_calls_are_not_theirs() -> None:
    judge = asked([7], [8], 2.0, agent="judge")
    spans = (FIRST | {"agent": "writer"}, judge, reward(1.0, 3.0))
    assert steps(*spans, agent_match="writer") == [[0, 0, 1.0]]


def within(name: str, start: float, end: float, parent: str | None = None) -> Row:
    return at(span("ro", name="work", span_id=name, parent_id=parent), start, end)


def test_first_sibling_looks_only_beside_the_reward() -> None:
    """Two workers at once; each tells its reward while the other's call is the last one."""
    spans = (
        within("a", 0.0, 10.0),
        within("b", 0.5, 9.0),
        asked([1], [2], 1.0, parent_id="a"),
        asked([5], [6], 2.0, parent_id="b"),
        reward(0.25, 4.0, parent_id="a"),
        reward(0.5, 5.0, parent_id="b"),
    )
    assert steps(*spans) == [[0, 0.5], [0, 0.25]]
    assert steps(*spans, reward_match="first_sibling") == [[0, 0.25], [0, 0.5]]


def test_a_captured_call_has_the_place_of_its_clients_span_or_of_what_encloses_it() -> None:
    """Calls that were captured at the server have no parent; the client's spans around them do, if it was traced."""
    inside = [
        within("a", 0.0, 4.6),
        asked([1], [2], 1.0, 1.5),
        within("b", 5.0, 9.0),
        asked([5], [6], 6.0, 6.5),
        reward(0.25, 4.5, parent_id="a"),
        reward(0.5, 8.0, parent_id="b"),
    ]
    expected = [[0, 0.25], [0, 0.5]]
    assert steps(*inside, reward_match="first_sibling") == expected
    client = {"name": "openai.chat.completion", "status": "OK"}
    seen = [
        at(span("ro", parent_id="a", **client), 0.9, 1.6),
        at(span("ro", parent_id="b", **client), 5.9, 6.6),
    ]
    assert steps(*inside, *seen, reward_match="first_sibling") == expected
    assert steps(*inside, *seen) == expected


def test_a_reward_told_during_another_call_is_not_lost() -> None:
    long = asked([5], [6], 1.0, 9.0)
    spans = (asked([1], [2], 1.0, 2.0), long, reward(0.5, 3.0), reward(1.0, 10.0))
    for match in ("first_occurrence", "first_sibling"):
        assert steps(*spans, reward_match=match) == [[0, 0.5], [0, 1.0]]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=8))
def test_rewards_are_matched_as_the_adapter_of_0_3_does(happened: list[tuple[bool, int]]) -> None:
    """On a trace that the adapter can read: calls with response ids at their client."""
    spans, context = [], [1]
    for number, (is_call, value) in enumerate(happened):
        if is_call:
            told = {"gen_ai.response.id": f"r{number}"}
            spans.append(asked(context, [number], float(number), attributes=told))
            context = [*context, number, 50 + number]
        else:
            spans.append(reward(float(value), float(number)))
    if not any(is_call for is_call, _ in happened) or all(is_call for is_call, _ in happened):
        return
    from lightning_ray.store.schema import read_spans

    triplets = lr.TracerTraceToTriplet()(read_spans(table(*spans)))
    [row] = steps(*spans)
    ends = [turn.end - 1 for turn in outcome(*spans).episode.trajectories[0].turns]
    assert [row[end] for end in ends] == [triplet.reward or 0.0 for triplet in triplets]
    assert sum(row) == sum(triplet.reward or 0.0 for triplet in triplets)


def test_step_rewards_are_a_column_only_where_they_are_credited() -> None:
    spans = (FIRST, reward(0.25, 2.0), SECOND, reward(1.0, 4.0))
    one, two = read(*spans), read(FIRST, SECOND, reward(0.0, 4.0))
    two.rollout.rollout_id = "other"
    groups = {"ro": "g", "other": "g"}
    plain = batch_of(settle([one, two], groups).trained, groups)
    assert plain.schema == BATCH_SCHEMA
    batch = batch_of(settle([one, two], groups, BatchSettings(credit="step")).trained, groups)
    assert batch.schema == STEP_SCHEMA
    assert batch["step_rewards"].to_pylist() == [[0, 0, 0.25, 0, 0, 1.0], [0.0] * 6]
    assert batch["reward"].to_pylist() == [1.0, 0.0]
    assert batch.select(BATCH_SCHEMA.names) == plain


def test_the_update_reads_the_batch() -> None:
    pytest.importorskip("torch")
    from lightning_ray.policy.batch import read_batch

    one, two = read(FIRST, reward(0.25, 2.0), SECOND, reward(1.0, 4.0)), read(FIRST, SECOND, reward(0.0, 4.0))
    two.rollout.rollout_id = "other"
    groups = {"ro": "g", "other": "g"}
    for chosen in (BatchSettings(), BatchSettings(credit="step", level="transition")):
        batch = read_batch(batch_of(settle([one, two], groups, chosen).trained, groups))
        assert batch.reward.tolist() == [1.0, 0.0] and batch.trained_per_rollout().tolist() == [4, 4]


# Shaping


def test_overlong_responses_are_punished_linearly() -> None:
    settings = OverlongPenalty(max_tokens=100, cache_tokens=20)
    for tokens, expected in ((1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (101, -1.0), (9999, -1.0)):
        assert overlong_penalty(tokens, settings) == pytest.approx(expected)
    assert overlong_penalty(90, OverlongPenalty(max_tokens=100, cache_tokens=20, penalty=0.5)) == -0.25
    assert overlong_penalty(0, OverlongPenalty(max_tokens=4, cache_tokens=4)) == 0.0


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 1000))
def test_the_punishment_never_grows_smaller_with_length(maximum: int, cache: int, tokens: int) -> None:
    settings = OverlongPenalty(max_tokens=max(maximum, cache), cache_tokens=cache)
    shorter, longer = overlong_penalty(tokens, settings), overlong_penalty(tokens + 1, settings)
    assert -1.0 <= longer <= shorter <= 0.0


def test_the_longest_row_is_what_is_punished_before_it_is_cut() -> None:
    overlong = {"max_tokens": 6, "cache_tokens": 2}
    spans = (FIRST, SECOND, asked([7], [8], 4.0), reward(1.0, 5.0))
    found = outcome(*spans, overlong=overlong)
    assert (found.penalty, found.episode.reward) == (-0.5, 0.5), "the first row has five tokens behind its prompt"
    cut = outcome(*spans, overlong=overlong, max_tokens=3, on_too_long="truncate")
    assert (cut.penalty, cut.rows_truncated) == (-0.5, 1)
    assert outcome(*spans, overlong=overlong, level="transition").penalty == 0.0


def test_of_steps_the_punishment_is_the_last_calls() -> None:
    spans = (FIRST, reward(0.25, 2.0), SECOND, reward(1.0, 4.0))
    overlong = {"max_tokens": 6, "cache_tokens": 2}
    assert steps(*spans, overlong=overlong) == [[0, 0, 0.25, 0, 0, 0.5]]
