"""The figures of a step, from hand-made episodes, and the clock of its phases."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lightning_ray.policy.proof import Proof
from lightning_ray.policy.swap import Swap
from lightning_ray.run.phases import PhaseClock, shares
from lightning_ray.run.step_figures import (
    StepTimes,
    agents_of,
    length_figures,
    policy_figures,
    reward_figures,
    step_figures,
    swap_figures,
    time_figures,
)
from lightning_ray.run.summary import time_shares
from lightning_ray.store.schema import SPAN_SCHEMA
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.join import ModelCall, join_calls
from lightning_ray.types import Rollout

NAN, INF = float("nan"), float("inf")


def episode(rollout_id: str, reward: float | None, *calls: tuple[int, int]) -> Episode:
    """``calls`` are lengths of prompt and answer; none extends another."""
    made = [
        ModelCall(
            np.full(prompt, 100 + number, np.int32),
            np.zeros(sampled, np.int32),
            np.zeros(sampled, np.float32),
            np.zeros(sampled, np.int32),
        )
        for number, (prompt, sampled) in enumerate(calls)
    ]
    rollout = Rollout(rollout_id=rollout_id, input={}, start_time=0.0, status="succeeded")
    return Episode(rollout, join_calls(made), reward, {}, len(calls), sum(sampled for _, sampled in calls))


# Rewards


def test_rewards_are_means_over_those_that_are_finite() -> None:
    assert reward_figures({"a": 0.0, "b": 1.0, "c": None, "d": NAN, "e": INF}) == {"reward": 0.5, "reward_std": 0.5}
    assert reward_figures({"c": None, "d": NAN, "e": INF}) == {"reward": None, "reward_std": None}


def test_an_agents_reward_is_that_of_the_rollouts_it_took_part_in() -> None:
    rewards = {"a": 1.0, "b": 0.0, "c": None, "d": 0.5}
    agents = {"a": {"writer", "editor"}, "b": {"writer"}, "c": {"editor"}}
    found = reward_figures(rewards, agents)
    assert (found["reward_by_agent.writer"], found["reward_by_agent.editor"]) == (0.5, 1.0)
    assert list(reward_figures(rewards, {"a": {"writer"}, "b": {"writer"}})) == ["reward", "reward_std"]


def test_agents_are_those_of_the_model_calls_of_the_attempt_that_counts() -> None:
    def span(rollout: str, attempt: str, agent: str | None, prompt: list[int] | None = None) -> dict[str, Any]:
        return {"rollout_id": rollout, "attempt_id": attempt, "agent": agent, "prompt_ids": prompt}

    rows = [
        span("a", "1", "lost", [1]),
        span("a", "2", "writer", [1]),
        span("a", "2", "editor", [1, 2]),
        span("a", "2", "writer", [1]),
        span("b", "3", None, [1]),
        span("b", "3", "no call"),
    ]
    wanted = [SPAN_SCHEMA.field(name) for name in rows[0]]
    import pyarrow as pa

    table = pa.Table.from_pylist(rows, pa.schema([field.with_nullable(True) for field in wanted]))
    assert agents_of(table, {"a": "2", "b": "3"}) == {"a": {"writer", "editor"}}
    assert agents_of(table.slice(0, 0), {}) == {}


# Lengths, swaps, times


def test_lengths_are_of_the_trajectories() -> None:
    found = length_figures([episode("a", 1.0, (3, 1), (5, 7)), episode("b", 1.0, (1, 1)), episode("c", None)])
    assert found == {
        "prompt_tokens_mean": 3.0,
        "prompt_tokens_max": 5,
        "response_tokens_mean": 3.0,
        "response_tokens_max": 7,
        "trajectory_tokens_mean": 6.0,
        "trajectory_tokens_max": 12,
    }
    assert set(length_figures([]).values()) == {None}


def test_a_swap_tells_what_the_replicas_tell() -> None:
    proofs = [Proof("r", 1, 0.0, 1e-4)]
    assert swap_figures(None) == {"swap_ms": None}
    assert swap_figures(Swap(1, 0.5, proofs)) == {"swap_ms": 500.0}
    assert swap_figures(Swap(1, 0.5, proofs, bytes=10**9, phases={"apply": 0.1})) == {
        "swap_ms": 500.0,
        "swap_bytes": 10**9,
        "swap_gb_per_s": 2.0,
        "swap_ms.apply": 100.0,
    }


def test_shares_of_the_time_add_up_to_one() -> None:
    found = time_figures({"update": 3.0, "other": 1.0})
    assert found == {"wall_seconds": 4.0, "time.update": 0.75, "time.other": 0.25}
    assert time_figures({}) == {"wall_seconds": 0} and shares({"other": 0.0}) == {}


def test_the_summary_weighs_shares_by_their_time() -> None:
    rows = [
        {"kind": "val", "step": 0},
        {"wall_seconds": 1.0, "time.update": 1.0},
        {"wall_seconds": 3.0, "time.update": 0.0, "time.other": 1.0},
    ]
    assert time_shares(rows) == {"update": 0.25, "other": 0.75} and time_shares(rows[:1]) == {}


# The row


def test_the_row_of_a_step_has_it_all_and_is_json() -> None:
    played = [episode("a", 1.0, (3, 2), (4, 2)), episode("b", 0.0, (3, 4)), episode("c", None)]
    account = Account(trained=played[:2], dropped={"c": "no_model_call"})
    update = {"trained_tokens": 8.0, "seconds": 2.0, "entropy": 0.5, "staleness_0": 1.0}
    swap = Swap(1, 0.5, [], bytes=10**9)
    times = StepTimes(2.0, 5.0, {"update": 2.0, "swap": 2.0})
    row = {**step_figures(4, played, times, {}), **policy_figures(played, account, update, swap, times)}
    expected = {
        "kind": "train",
        "step": 4,
        "reward": 0.5,
        "turns": 1.0,
        "turns_max": 2,
        "rollouts": 3,
        "rollouts_trained": 2,
        "dropped.no_model_call": 1,
        "rows": 3,
        "trajectories_per_rollout": 1.0,
        "trajectory_tokens_max": 7,
        "seconds": 5.0,
        "sampled_tokens": 8,
        "sampled_tokens_per_s": 4.0,
        "trained_tokens_per_s": 4.0,
        "swap_ms": 500.0,
        "swap_bytes": 10**9,
        "swap_gb_per_s": 2.0,
        "time.swap": 0.5,
        "update.entropy": 0.5,
        "update.staleness_0": 1.0,
    }
    assert {name: row[name] for name in expected} == expected
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_step_without_rollouts_or_update_has_a_row_too() -> None:
    times = StepTimes(0.0, 0.0)
    row = {**step_figures(0, [], times, {}), **policy_figures([], Account(), {}, None, times)}
    assert (row["reward"], row["turns"], row["trajectories_per_rollout"]) == (None, None, None)
    assert (row["sampled_tokens_per_s"], row["trained_tokens_per_s"], row["swap_ms"]) == (0.0, 0.0, None)


# The clock


class Time:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_time_counts_for_the_innermost_phase() -> None:
    time = Time()
    clock = PhaseClock(time)
    time.now += 1
    with clock.phase("rollouts"):
        time.now += 2
        with clock.phase("settle"):
            time.now += 4
        time.now += 8
    time.now += 16
    assert clock.lap() == {"other": 17.0, "rollouts": 10.0, "settle": 4.0}
    assert sum(clock.lap().values()) == 0.0


def test_a_phase_that_fails_has_taken_its_time() -> None:
    time = Time()
    clock = PhaseClock(time)
    with pytest.raises(ValueError), clock.phase("update"):
        time.now += 1
        raise ValueError
    time.now += 1
    assert clock.lap() == {"other": 1.0, "update": 1.0}


def test_a_lap_within_a_phase_splits_it() -> None:
    time = Time()
    clock = PhaseClock(time)
    with clock.phase("update"):
        time.now += 1
        assert clock.lap()["update"] == 1.0
        time.now += 2
    assert clock.lap()["update"] == 2.0
