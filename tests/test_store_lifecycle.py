"""The rollout state machine, case by case; ``test_store_histories`` has any history."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ray.errors import StoreError
from lightning_ray.store.lifecycle import MAX_INFRASTRUCTURE_FAILURES, OWN_LOSS, SEQUENCE_BLOCK, Lifecycle
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.state import RunState
from lightning_ray.types import (
    LLM,
    EnqueueRolloutRequest,
    RolloutConfig,
)
from tests.lifecycle_calls import LEASE, RETRY, arrive, attempts, enqueue, finish, lease, make


def test_queue_is_first_in_first_out() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b", "c")
    assert [claim.rollout_id for claim in lifecycle.dequeue(2, "w", None, 0.0)] == ["a", "b"]
    assert [claim.rollout_id for claim in lifecycle.dequeue(2, "w", None, 0.0)] == ["c"]
    assert lifecycle.dequeue(2, "w", None, 0.0) == []


def test_states_on_the_way_to_success() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    assert lifecycle.rollout("a").status == "queuing"
    attempt = lease(lifecycle, now=1.0)
    assert (lifecycle.rollout("a").status, attempts(lifecycle, "a")[0].status) == ("preparing", "preparing")
    arrive(lifecycle, "a", attempt, 2.0)
    assert (lifecycle.rollout("a").status, attempts(lifecycle, "a")[0].status) == ("running", "running")
    rollout = finish(lifecycle, "a", attempt, "succeeded", {"note": 1}, 3.0)
    assert (rollout.status, rollout.end_time, attempts(lifecycle, "a")[0].metadata) == (
        "succeeded",
        3.0,
        {"note": 1},
    )


def test_enqueueing_again_changes_nothing() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "a")
    attempt = lease(lifecycle)
    finish(lifecycle, "a", attempt, "succeeded", None, 1.0)
    enqueue(lifecycle, "a", now=2.0)
    assert lifecycle.rollout("a").status == "succeeded"
    assert lifecycle.dequeue(1, "w", None, 3.0) == []


def test_a_failure_is_retried_as_configured_and_no_more() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RETRY)
    assert finish(lifecycle, "a", lease(lifecycle), "failed", {"reason": "bug"}, 1.0).status == "requeuing"
    rollout = finish(lifecycle, "a", lease(lifecycle), "failed", {"reason": "bug"}, 1.0)
    assert (rollout.status, rollout.metadata) == ("failed", {"failure": {"kind": "failed", "reason": "bug"}})
    assert [attempt.sequence_id for attempt in attempts(lifecycle, "a")] == [1, 2]


def test_a_condition_not_named_is_not_retried() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RolloutConfig(max_attempts=3, retry_condition=["timeout"]))
    assert finish(lifecycle, "a", lease(lifecycle), "failed", None, 1.0).status == "failed"


def test_the_end_of_an_attempt_is_final() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RETRY)
    first = lease(lifecycle)
    finish(lifecycle, "a", first, "failed", None, 1.0)
    assert finish(lifecycle, "a", first, "succeeded", None, 2.0).status == "requeuing"
    second = lease(lifecycle)
    arrive(lifecycle, "a", first, 3.0)
    assert finish(lifecycle, "a", first, "succeeded", None, 3.0).status == "preparing"
    assert finish(lifecycle, "a", second, "succeeded", None, 4.0).status == "succeeded"
    assert finish(lifecycle, "a", second, "failed", None, 5.0).end_time == 4.0


def test_watchdog_times_out_from_the_start_and_unresponsive_from_the_last_sign_of_life() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RolloutConfig(timeout_seconds=10))
    enqueue(lifecycle, "b", config=RolloutConfig(unresponsive_seconds=10))
    a, b = (claim.attempt.attempt_id for claim in lifecycle.dequeue(2, "w", None, 0.0))
    arrive(lifecycle, "a", a, 9.0)
    arrive(lifecycle, "b", b, 9.0)
    lifecycle.tick(10.0)
    assert {lifecycle.rollout(rollout_id).status for rollout_id in "ab"} == {"running"}
    lifecycle.tick(10.1)
    assert [attempts(lifecycle, rollout_id)[0].status for rollout_id in "ab"] == ["timeout", "running"]
    lifecycle.heartbeat("w", [("b", b)], 19.0)
    lifecycle.tick(29.0)
    assert lifecycle.rollout("b").status == "running"
    lifecycle.tick(29.1)
    failure = {"kind": "unresponsive", "reason": "no sign of life for 10.0 s"}
    assert lifecycle.rollout("b").metadata == {"failure": failure}


def test_limits_that_are_changed_hold_for_the_attempt_at_work() -> None:
    lifecycle = make()
    enqueue(lifecycle, "shorter", "longer", config=RolloutConfig(timeout_seconds=50))
    lifecycle.dequeue(2, "w", None, 0.0)
    lifecycle.update_rollout("shorter", {"config": RolloutConfig(timeout_seconds=5)}, 1.0)
    lifecycle.update_rollout("longer", {"config": RolloutConfig(timeout_seconds=55)}, 1.0)
    lifecycle.tick(5.1)
    assert [attempts(lifecycle, name)[0].status for name in ("shorter", "longer")] == ["timeout", "preparing"]
    lifecycle.tick(50.1)
    assert attempts(lifecycle, "longer")[0].status == "preparing"
    lifecycle.tick(55.1)
    assert attempts(lifecycle, "longer")[0].status == "timeout"


def test_a_claim_that_is_never_started_comes_back() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    lease(lifecycle)
    lifecycle.tick(LEASE)
    assert lifecycle.rollout("a").status == "preparing"
    lifecycle.tick(LEASE + 0.1)
    assert lifecycle.rollout("a").status == "requeuing"
    assert (attempts(lifecycle, "a")[0].metadata or {})["infrastructure"] is True


def test_heartbeats_renew_and_tell_what_to_stop() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b", "c")
    held = [(claim.rollout_id, claim.attempt.attempt_id) for claim in lifecycle.dequeue(3, "w", None, 0.0)]
    assert lifecycle.heartbeat("w", held, 50.0) == []
    lifecycle.tick(LEASE + 10.0)
    lifecycle.update_rollout("a", {"status": "cancelled"}, 70.0)
    finish(lifecycle, "b", held[1][1], "timeout", None, 70.0)
    assert lifecycle.heartbeat("w", held, 71.0) == held[:2]
    assert lifecycle.heartbeat("other", held[2:], 71.0) == held[2:]


def test_a_lost_worker_is_not_the_agents_fault_but_bounded() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    for failure in range(MAX_INFRASTRUCTURE_FAILURES):
        lease(lifecycle, worker_id=f"w{failure}")
        assert lifecycle.release_worker(f"w{failure}", "killed", 1.0) == ["a"]
        assert lifecycle.rollout("a").status == "requeuing"
    lease(lifecycle, worker_id="last")
    assert lifecycle.release_worker("last", "killed", 1.0) == ["a"]
    rollout = lifecycle.rollout("a")
    assert rollout.status == "failed"
    assert rollout.metadata == {"failure": {"kind": "infrastructure", "reason": "worker last was lost: killed"}}
    assert lifecycle.release_worker("last", "killed", 1.0) == []


def test_what_many_lost_together_is_hardly_the_doing_of_one() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b")
    for failure in range(MAX_INFRASTRUCTURE_FAILURES * OWN_LOSS):
        lifecycle.dequeue(2, f"w{failure}", None, 0.0)
        assert lifecycle.release_worker(f"w{failure}", "killed", 1.0) == ["a", "b"]
        assert lifecycle.rollout("a").status == "requeuing"
    lease(lifecycle, worker_id="last")
    assert lifecycle.release_worker("last", "killed", 1.0) == ["a"]
    assert (lifecycle.rollout("a").status, lifecycle.rollout("b").status) == ("failed", "requeuing")


@pytest.mark.parametrize("how", ["released", "silent"])
def test_what_a_lost_worker_played_is_played_next_but_not_again_and_again(how: str) -> None:
    lifecycle, now = make(), 0.0
    enqueue(lifecycle, "a", "b", "waiting")

    def lose(worker_id: str) -> list[str]:
        nonlocal now
        lifecycle.dequeue(2, worker_id, None, now)
        now += LEASE + 1.0
        if how == "released":
            lifecycle.release_worker(worker_id, "killed", now)
        lifecycle.tick(now)
        return list(lifecycle.state.queue)

    first, second = lose("w1"), lose("w2")
    assert sorted(first[:2]) == ["a", "b"] and first[2] == "waiting"
    assert second[0] == "waiting" and sorted(second[1:]) == ["a", "b"]


def test_what_its_runner_reports_to_have_failed_waits_its_turn() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "waiting")
    attempt_id = lease(lifecycle, worker_id="w")
    finish(lifecycle, "a", attempt_id, "failed", {"infrastructure": True, "reason": "no door"}, 1.0)
    assert list(lifecycle.state.queue) == ["waiting", "a"]


def test_a_worker_can_report_a_failure_of_the_infrastructure() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    told = {"infrastructure": True, "reason": "endpoint gone"}
    assert finish(lifecycle, "a", lease(lifecycle), "failed", told, 1.0).status == "requeuing"
    assert finish(lifecycle, "a", lease(lifecycle), "failed", None, 2.0).status == "failed"


def test_cancelling() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b")
    assert lifecycle.update_rollout("b", {"status": "cancelled"}, 1.0).status == "cancelled"
    attempt = lease(lifecycle)
    assert lifecycle.update_rollout("a", {"status": "cancelled"}, 2.0).end_time == 2.0
    assert finish(lifecycle, "a", attempt, "succeeded", None, 3.0).status == "cancelled"
    assert lifecycle.dequeue(5, "w", None, 4.0) == []
    assert lifecycle.update_rollout("a", {"status": "running"}, 5.0).status == "cancelled"


def test_a_repeated_request_gets_its_claims_again() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b", "c")
    first = lifecycle.dequeue(2, "w", "rq-1", 0.0)
    assert lifecycle.dequeue(2, "w", "rq-1", 1.0) == first
    finish(lifecycle, "a", first[0].attempt.attempt_id, "succeeded", None, 2.0)
    assert [claim.rollout_id for claim in lifecycle.dequeue(2, "w", "rq-1", 3.0)] == ["b"]
    assert [claim.rollout_id for claim in lifecycle.dequeue(2, "w", "rq-2", 3.0)] == ["c"]


def test_resources_have_versions_and_rollouts_get_the_latest() -> None:
    lifecycle = make()
    resources: Any = {"llm": LLM(endpoint="http://h/v1", model="m", sampling_parameters={"temperature": 1.0})}
    assert lifecycle.update_resources("v0", resources, 1.0).version == 1
    assert lifecycle.update_resources("v0", resources, 2.0).version == 1
    changed: Any = {"llm": LLM(endpoint="http://other/v1", model="m")}
    update = lifecycle.update_resources("v0", changed, 3.0)
    assert (update.version, update.create_time, update.update_time) == (2, 1.0, 3.0)
    assert update.resources == changed
    lifecycle.update_resources("v1", resources, 4.0)
    assert lifecycle.update_resources("v0", changed, 5.0).version == 2
    enqueue(lifecycle, "a")
    assert lifecycle.rollout("a").resources_id == "v0"
    with pytest.raises(StoreError, match="'v9'"):
        lifecycle.enqueue([EnqueueRolloutRequest(input=1, resources_id="v9")], 4.0)


@pytest.mark.parametrize("refused", ["ghost", "status", "input"])
def test_a_refused_call_leaves_no_trace(refused: str) -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    attempt = lease(lifecycle)
    lifecycle.take_events()
    with pytest.raises(StoreError, match={"ghost": "at-ghost", "status": "running", "input": "object"}[refused]):
        if refused == "ghost":
            finish(lifecycle, "a", "at-ghost", "succeeded", None, 1.0)
        elif refused == "status":
            finish(lifecycle, "a", attempt, "running", None, 1.0)
        else:
            lifecycle.enqueue([EnqueueRolloutRequest(input=1), EnqueueRolloutRequest(input=object())], 1.0)
    assert lifecycle.take_events() == []


def test_a_reopened_store_gives_live_attempts_a_fresh_lease() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    lease(lifecycle)
    lifecycle.reopened(1000.0)
    lifecycle.tick(1000.0 + LEASE)
    assert lifecycle.rollout("a").status == "preparing"
    lifecycle.tick(1000.1 + LEASE)
    assert lifecycle.rollout("a").status == "requeuing"


def test_numbers_are_reserved_in_blocks_and_given_without_gaps() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    pair = ("a", lease(lifecycle))
    lifecycle.take_events()
    given = [lifecycle.next_sequences([pair], 1.0)[0] for _ in range(SEQUENCE_BLOCK)]
    assert given == list(range(1, SEQUENCE_BLOCK + 1))
    assert len(lifecycle.take_events()) == 1
    assert lifecycle.next_sequences([pair, pair], 1.0) == [SEQUENCE_BLOCK + 1, SEQUENCE_BLOCK + 2]
    arrive(lifecycle, *pair, 2.0)
    assert lifecycle.last_sequence("a") == SEQUENCE_BLOCK + 3
    arrive(lifecycle, *pair, 2.0, last=1000)
    assert lifecycle.next_sequences([pair], 3.0) == [1001]
    replayed = Lifecycle(state=replay(lifecycle.take_events(), "a", pair[1]))
    assert replayed.next_sequences([pair], 4.0)[0] > 1001
    with pytest.raises(StoreError, match="no span numbers left"):
        arrive(lifecycle, *pair, 5.0, last=2**31)


def replay(events: list[Any], rollout_id: str, attempt_id: str) -> RunState:
    before = make()
    enqueue(before, rollout_id)
    before._make_id = lambda prefix: attempt_id
    lease(before)
    for event in unpack(pack(events, "events")):
        before.state.apply(event)
    return before.state


def test_requeuing_keeps_the_place_in_the_queue() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b")
    lifecycle.update_rollout("a", {"status": "requeuing"}, 1.0)
    assert list(lifecycle.state.queue) == ["a", "b"]
    lease(lifecycle)
    lifecycle.update_rollout("a", {"status": "queuing"}, 2.0)
    assert list(lifecycle.state.queue) == ["b", "a"]
    assert attempts(lifecycle, "a")[0].metadata == {"reason": "its rollout was set to queuing"}


def test_a_worker_is_logged_when_it_is_first_seen_and_when_it_tells_something() -> None:
    lifecycle = make()
    for now in (1.0, 2.0):
        lifecycle.update_worker("w", None, now)
        lifecycle.heartbeat("w", [], now)
        lifecycle.dequeue(1, "w", None, now)
    assert len(lifecycle.take_events()) == 1
    for now in (3.0, 4.0):
        lifecycle.update_worker("w", {"cpu": 1}, now)
    assert len(lifecycle.take_events()) == 2
