"""From trajectories to rows: levels, branches and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_ray as lr
from lightning_ray.launch import Launch, launched
from lightning_ray.trajectories.account import Account, batch_of, settle
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.join import ModelCall, Trajectory, join_calls
from lightning_ray.trajectories.rows import at_level, within_limits
from lightning_ray.trajectories.settings import BatchSettings
from tests.test_trajectories import call, conversations, rollout, tokens


def masks(trajectories: list[Trajectory]) -> list[list[int]]:
    return [trajectory.mask.tolist() for trajectory in trajectories]


def rows(*calls: ModelCall, **settings: Any) -> Any:
    """What is left of the rows of a rollout with these calls, and what became of it."""
    chosen = BatchSettings(**settings)
    return within_limits(at_level(join_calls(calls), chosen.level), chosen)


# Branches

TRUNK = [call([1, 2], [3, 4], 0), call([1, 2, 3, 4, 9], [5], 1)]


def test_a_call_that_branches_off_in_the_midst_trains_only_what_it_sampled() -> None:
    first, second = join_calls([*TRUNK, call([1, 2, 3, 4, 9], [6, 7], 2)])
    assert tokens(first) == [1, 2, 3, 4, 9, 5] and first.mask.tolist() == [0, 0, 1, 1, 0, 1]
    assert tokens(second) == [1, 2, 3, 4, 9, 6, 7] and second.mask.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert second.logprobs.tolist() == [0, 0, 0, 0, 0, -1, -2]
    assert second.weight_versions.tolist() == [-1, -1, -1, -1, -1, 2, 2]
    assert second.broken_prefix == 5 and second.prompt_length == 5


def test_best_of_n_trains_each_answer_once_and_goes_on_with_the_chosen_one() -> None:
    prompt = [1, 2, 3, 4, 9]
    answers = [call(prompt, [6], 1), call(prompt, [7], 2), call(prompt, [8], 3)]
    a, b, c = join_calls([TRUNK[0], *answers, call([*prompt, 7, 0], [5], 4)])
    assert (tokens(a), a.mask.tolist()) == ([*prompt, 6], [0, 0, 1, 1, 0, 1])
    assert (tokens(b), b.mask.tolist()) == ([*prompt, 7, 0, 5], [0, 0, 0, 0, 0, 1, 0, 1])
    assert (tokens(c), c.mask.tolist()) == ([*prompt, 8], [0, 0, 0, 0, 0, 1])
    assert [turn.call for turn in b.turns] == [2, 4]


def test_a_branch_of_a_branch_shares_no_trained_token() -> None:
    calls = [call([1], [2], 0), call([1, 2, 3], [4], 1), call([1, 2, 3], [5], 2), call([1, 2, 3, 5, 6], [7], 3)]
    calls += [call([1, 2, 3, 5, 6], [8], 4)]
    assert masks(join_calls(calls)) == [[0, 1, 0, 1], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1]]


def test_at_level_transition_each_call_is_a_row_in_the_order_of_the_calls() -> None:
    calls = [*TRUNK, call([7], [8], 2), call([1, 2, 3, 4, 9, 5], [6], 3)]
    found = at_level(join_calls(calls), "transition")
    assert [tokens(row) for row in found] == [[1, 2, 3, 4], [1, 2, 3, 4, 9, 5], [7, 8], [1, 2, 3, 4, 9, 5, 6]]
    assert masks(found) == [[0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0, 1], [0, 0, 0, 0, 0, 0, 1]]
    assert [row.prompt_length for row in found] == [2, 5, 1, 6]
    assert found[1].weight_versions.tolist() == [-1, -1, -1, -1, -1, 1]
    assert found[1].logprobs.tolist() == [0, 0, 0, 0, 0, -1]


@given(conversations())
def test_concatenation_masks_and_turns(calls: list[ModelCall]) -> None:
    """A trajectory is its last call's tokens; what its calls sampled has mask 1, and nothing else."""
    trajectories = join_calls(calls)
    assert sorted(turn.call for t in trajectories for turn in t.turns) == list(range(len(calls)))
    for t in trajectories:
        last = calls[t.turns[-1].call]
        assert tokens(t) == [*last.prompt_ids.tolist(), *last.sampled_ids.tolist()]
        assert t.prompt_length == len(calls[t.turns[0].call].prompt_ids)
        expected = np.zeros(len(t.token_ids), np.int8)
        for number, start, end in t.turns:
            made = calls[number]
            assert tokens(t)[:end] == [*made.prompt_ids.tolist(), *made.sampled_ids.tolist()]
            assert end - start == len(made.sampled_ids)
            expected[start:end] += 1
        assert np.array_equal(t.mask, expected)


@given(conversations(), st.sampled_from(["trajectory", "transition"]))
def test_every_sampled_token_is_trained_once_over_all_rows(calls: list[ModelCall], level: Any) -> None:
    found = at_level(join_calls(calls), level)
    trained = [
        (int(version), int(token), float(logprob))
        for row in found
        for version, token, logprob, mask in zip(
            row.weight_versions, row.token_ids, row.logprobs, row.mask, strict=True
        )
        if mask
    ]
    sampled = [
        (number, int(token), float(logprob))
        for number, made in enumerate(calls)
        for token, logprob in zip(made.sampled_ids, made.logprobs, strict=True)
    ]
    assert sorted(trained) == sorted(sampled)
    if level == "transition":
        assert [tokens(row) for row in found] == [
            [*made.prompt_ids.tolist(), *made.sampled_ids.tolist()] for made in calls
        ]


@given(conversations())
def test_calls_are_joined_as_a_plain_reading_of_the_rule_says(calls: list[ModelCall]) -> None:
    """Each to the longest trajectory that its prompt extends, the first of those."""
    plain: list[list[int]] = []
    for made in calls:
        prompt, sampled = made.prompt_ids.tolist(), made.sampled_ids.tolist()
        fitting = [each for each in plain if prompt[: len(each)] == each]
        if fitting:
            max(fitting, key=len)[:] = [*prompt, *sampled]
        else:
            plain.append([*prompt, *sampled])
    assert [tokens(t) for t in join_calls(calls)] == plain


# Limits


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"max_prompt_tokens": 1}, ("prompt_too_long", "2 tokens, at most 1")),
        ({"max_response_tokens": 3}, ("response_too_long", "4 tokens, at most 3")),
        ({"max_tokens": 5}, ("too_long", "6 tokens, at most 5")),
        ({"max_prompt_tokens": 1, "max_tokens": 5}, ("prompt_too_long", "2 tokens, at most 1")),
        ({"max_prompt_tokens": 2, "max_response_tokens": 4, "max_tokens": 6}, None),
        ({}, None),
    ],
)
def test_a_rollout_with_a_row_past_a_limit_is_refused_by_name(settings: Any, refusal: Any) -> None:
    found = rows(*TRUNK, **settings)
    assert found.refusal == refusal
    beside = rows(call([8], [8]), *TRUNK, call([7], [7]), **settings)
    assert beside.refusal == refusal and not beside.truncated


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_prompt_tokens": 1, "on_prompt_too_long": "drop_rows"}, "prompt_too_long"),
        ({"max_response_tokens": 3, "on_response_too_long": "drop_rows"}, "response_too_long"),
        ({"max_tokens": 5, "on_too_long": "drop_rows"}, "too_long"),
    ],
)
def test_only_the_rows_past_a_limit_may_be_left_out(settings: Any, reason: str) -> None:
    found = rows(*TRUNK, call([7], [7]), **settings)
    assert [tokens(row) for row in found.kept] == [[7, 7]]
    assert (found.refusal, dict(found.dropped), found.truncated) == (None, {reason: 1}, 0)
    assert rows(*TRUNK, **settings).refusal == (reason, "1 of 1 rows")


def test_a_row_is_cut_behind_its_last_sampled_token_that_fits() -> None:
    long = [*TRUNK, call([1, 2, 3, 4, 9, 5, 8, 8], [6, 6])]
    for limit in ({"max_response_tokens": 5}, {"max_tokens": 7}):
        found = rows(*long, on_response_too_long="truncate", on_too_long="truncate", **limit)
        [row] = found.kept
        assert tokens(row) == [1, 2, 3, 4, 9, 5] and row.mask.tolist() == [0, 0, 1, 1, 0, 1]
        assert row.calls == 2 and found.truncated == 1 and not found.dropped
    [row] = rows(*long, on_too_long="truncate", max_tokens=9).kept
    assert tokens(row)[-1] == 6 and row.turns[-1].end == 9 and row.mask.sum() == 4


def test_a_row_of_which_no_sampled_token_fits_is_left_out() -> None:
    found = rows(*TRUNK, call([7], [7]), max_tokens=2, on_too_long="truncate")
    assert [tokens(row) for row in found.kept] == [[7, 7]] and found.dropped == {"too_long": 1}
    assert rows(*TRUNK, max_tokens=2, on_too_long="truncate").refusal == ("too_long", "1 of 1 rows")


def test_the_strictest_choice_decides_where_a_row_exceeds_two_limits() -> None:
    limits = {"max_response_tokens": 3, "max_tokens": 5, "on_response_too_long": "truncate"}
    assert rows(*TRUNK, **limits).refusal == ("too_long", "6 tokens, at most 5")
    assert rows(*TRUNK, call([7], [7]), **limits, on_too_long="drop_rows").dropped == {"too_long": 1}
    [row] = rows(*TRUNK, **limits | {"max_tokens": 3}, on_too_long="truncate").kept
    assert tokens(row) == [1, 2, 3]


def test_rows_without_a_sampled_token_are_left_out_whatever_their_length() -> None:
    found = rows(*TRUNK, call([7] * 50, []), max_tokens=6)
    assert len(found.kept) == 1 and found.dropped == {"no_sampled_token": 1} and found.refusal is None
    mixed = rows(call([7], []), call([8], []), *TRUNK, max_tokens=5, on_too_long="drop_rows")
    assert mixed.refusal == ("too_long", "1 of 3 rows")


@given(conversations(), st.integers(2, 12), st.sampled_from(["trajectory", "transition"]))
def test_a_cut_row_is_the_beginning_of_the_whole_one(calls: list[ModelCall], limit: int, level: Any) -> None:
    whole = at_level(join_calls(calls), level)
    found = rows(*calls, level=level, max_tokens=limit, on_too_long="truncate")
    assert len(found.kept) + sum(found.dropped.values()) == len(whole)
    for row in found.kept:
        [origin] = [each for each in whole if each.turns[0].call == row.turns[0].call]
        length = len(row.token_ids)
        assert length <= limit and row.mask.any()
        for name in ("token_ids", "mask", "logprobs", "weight_versions"):
            assert np.array_equal(getattr(row, name), getattr(origin, name)[:length])
        assert sum(turn.end - turn.start for turn in row.turns) == row.mask.sum()


def test_settings_refuse_what_makes_no_sense() -> None:
    for values, message in (
        ({"on_prompt_too_long": "truncate"}, "on_prompt_too_long"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"reward_weights": {}}, "finite numbers by dimension"),
        ({"reward_weights": {"x": float("nan")}}, "finite numbers by dimension"),
        ({"overlong": {"max_tokens": 4, "cache_tokens": 5}}, "cache_tokens=5 is more than max_tokens=4"),
        ({"groups": {"alone": "forget"}}, "alone"),
        ({"levels": "x"}, "level"),
    ):
        with pytest.raises(lr.ConfigError, match=message):
            lr.GRPO(model="m", batch=values)  # type: ignore[arg-type]


def test_settings_are_reached_by_their_dotted_names() -> None:
    given = {"algorithm.batch.max_tokens": 64, "algorithm.batch.groups.no_variance": "resample"}
    given |= {"algorithm.batch.overlong": {"max_tokens": 60, "cache_tokens": 10}}  # type: ignore[dict-item]
    with launched(Launch(settings=dict(given))):
        made = lr.Trainer(algorithm=lr.GRPO(model="m", batch=lr.BatchSettings(level="transition")))
    batch = made.algorithm.batch
    assert (batch.max_tokens, batch.level, batch.groups.no_variance) == (64, "transition", "resample")
    assert batch.overlong == lr.OverlongPenalty(max_tokens=60, cache_tokens=10)
    assert BatchSettings(**made.algorithm.settings()["batch"]) == batch


# In the account


def played(rollout_id: str, reward: float, *calls: ModelCall) -> Episode:
    return Episode(
        rollout(rollout_id), join_calls(calls), reward, {}, len(calls), sum(len(one.sampled_ids) for one in calls)
    )


def account_of(*episodes: Episode, **settings: Any) -> Account:
    return settle(episodes, {each.rollout_id: "g" for each in episodes}, BatchSettings(**settings))


def test_the_account_counts_the_rows_that_were_left_out_and_cut() -> None:
    mixed = played("a", 1.0, *TRUNK, call([7], [7]), call([8], []))
    account = account_of(mixed, played("b", 0.0, call([7], [7])), max_tokens=5, on_too_long="drop_rows")
    assert account.rows_dropped == {"a": {"too_long": 1, "no_sampled_token": 1}} and not account.rows_truncated
    assert account.figures() == {
        "rows": 2,
        "rows_truncated": 0,
        "rows_dropped.no_sampled_token": 1,
        "rows_dropped.too_long": 1,
        "rollouts_overlong": 0,
        "groups_resampled": 0,
    }
    assert account.trained[0].sampled_tokens == 1 and mixed.sampled_tokens == 4
    cut = account_of(mixed, played("b", 0.0, call([7], [7])), max_tokens=5, on_too_long="truncate")
    assert cut.rows_truncated == {"a": 1} and cut.figures()["rows"] == 3
    refused = account_of(mixed, played("b", 0.0, call([7], [7])), max_tokens=5)
    assert refused.dropped == {"a": "too_long", "b": "group_of_one"}
    assert refused.details == {"a": "6 tokens, at most 5"}


def test_accounts_of_parts_of_a_step_add_up() -> None:
    whole = Account()
    limits: dict[str, Any] = {"max_tokens": 5, "on_too_long": "truncate"}
    for name in ("a", "b"):
        pair = [played(f"{name}0", 1.0, *TRUNK), played(f"{name}1", 0.0, call([7], [7]))]
        whole.add(account_of(*pair, **limits))
    assert [each.rollout_id for each in whole.trained] == ["a0", "a1", "b0", "b1"]
    assert whole.rows_truncated == {"a0": 1, "b0": 1} and whole.figures()["rows"] == 4


def test_a_batch_of_transitions_has_a_row_for_each_call() -> None:
    pair = [played("a", 1.0, *TRUNK), played("b", 0.0, call([7], [7]))]
    account = account_of(*pair, level="transition")
    batch = batch_of(account.trained, {"a": "g", "b": "g"})
    assert batch["rollout_id"].to_pylist() == ["a", "a", "b"] and batch["reward"].to_pylist() == [1.0, 1.0, 0.0]
    assert batch["mask"].to_pylist() == [[0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0, 1]]
    assert len(pair[0].trajectories) == 1, "what was played is left as it was"


def test_of_eight_turns_trajectories_forward_a_quarter_of_the_tokens_of_transitions() -> None:
    calls, context = [], list(range(200))
    for turn in range(8):
        made = call(context, [turn] * 100)
        calls.append(made)
        context = [*made.prompt_ids.tolist(), *made.sampled_ids.tolist(), *range(100)]
    forwarded = {
        level: sum(len(row.token_ids) for row in at_level(join_calls(calls), level))  # type: ignore[arg-type]
        for level in ("trajectory", "transition")
    }
    assert forwarded["trajectory"] / forwarded["transition"] <= 0.30
