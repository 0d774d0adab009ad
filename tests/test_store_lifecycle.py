"""The rollout state machine, with a given clock and no disk; a replay of its events ends where it stood."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightning_ray.errors import StoreError
from lightning_ray.store.lifecycle import MAX_INFRASTRUCTURE_FAILURES, Lifecycle
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.state import RunState
from lightning_ray.types import LLM, TERMINAL_ATTEMPT, TERMINAL_ROLLOUT, EnqueueRolloutRequest, RolloutConfig

LEASE = 60.0
RETRY = RolloutConfig(max_attempts=2, retry_condition=["failed", "timeout", "unresponsive"])


def make() -> Lifecycle:
    numbers = count()
    return Lifecycle(LEASE, lambda prefix: f"{prefix}-{next(numbers)}")


def enqueue(lifecycle: Lifecycle, *ids: str, now: float = 0.0, config: RolloutConfig | None = None) -> None:
    requests = [EnqueueRolloutRequest(rollout_id=rollout_id, input={"q": 1}, config=config) for rollout_id in ids]
    lifecycle.enqueue(requests, now)


def lease(lifecycle: Lifecycle, now: float = 0.0, worker_id: str = "w", request_id: str | None = None) -> str:
    return lifecycle.dequeue(1, worker_id, request_id, now)[0].attempt.attempt_id


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
    assert (lifecycle.rollout("a").status, lifecycle.attempts("a")[0].status) == ("preparing", "preparing")
    lifecycle.spans_arrived([("a", attempt, 0, 1)], 2.0)
    assert (lifecycle.rollout("a").status, lifecycle.attempts("a")[0].status) == ("running", "running")
    rollout = lifecycle.finish("a", attempt, "succeeded", {"note": 1}, 3.0)
    assert (rollout.status, rollout.end_time, lifecycle.attempts("a")[0].metadata) == (
        "succeeded",
        3.0,
        {"note": 1},
    )


def test_enqueueing_again_changes_nothing() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "a")
    attempt = lease(lifecycle)
    lifecycle.finish("a", attempt, "succeeded", None, 1.0)
    enqueue(lifecycle, "a", now=2.0)
    assert lifecycle.rollout("a").status == "succeeded"
    assert lifecycle.dequeue(1, "w", None, 3.0) == []


def test_a_failure_is_retried_as_configured_and_no_more() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RETRY)
    assert lifecycle.finish("a", lease(lifecycle), "failed", {"reason": "bug"}, 1.0).status == "requeuing"
    rollout = lifecycle.finish("a", lease(lifecycle), "failed", {"reason": "bug"}, 1.0)
    assert (rollout.status, rollout.metadata) == ("failed", {"failure": {"kind": "failed", "reason": "bug"}})
    assert [attempt.sequence_id for attempt in lifecycle.attempts("a")] == [1, 2]


def test_a_condition_not_named_is_not_retried() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RolloutConfig(max_attempts=3, retry_condition=["timeout"]))
    assert lifecycle.finish("a", lease(lifecycle), "failed", None, 1.0).status == "failed"


def test_the_end_of_an_attempt_is_final() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RETRY)
    first = lease(lifecycle)
    lifecycle.finish("a", first, "failed", None, 1.0)
    assert lifecycle.finish("a", first, "succeeded", None, 2.0).status == "requeuing"
    second = lease(lifecycle)
    lifecycle.spans_arrived([("a", first, 0, 1)], 3.0)
    assert lifecycle.finish("a", first, "succeeded", None, 3.0).status == "preparing"
    assert lifecycle.finish("a", second, "succeeded", None, 4.0).status == "succeeded"
    assert lifecycle.finish("a", second, "failed", None, 5.0).end_time == 4.0


def test_watchdog_times_out_from_the_start_and_unresponsive_from_the_last_span() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", config=RolloutConfig(timeout_seconds=10))
    enqueue(lifecycle, "b", config=RolloutConfig(unresponsive_seconds=10))
    a, b = (claim.attempt.attempt_id for claim in lifecycle.dequeue(2, "w", None, 0.0))
    lifecycle.spans_arrived([("a", a, 0, 1), ("b", b, 1, 1)], 9.0)
    lifecycle.tick(10.0)
    assert {lifecycle.rollout(rollout_id).status for rollout_id in "ab"} == {"running"}
    lifecycle.tick(10.1)
    assert [lifecycle.attempts(rollout_id)[0].status for rollout_id in "ab"] == ["timeout", "running"]
    lifecycle.heartbeat("w", [("b", b)], 19.0)
    lifecycle.tick(19.1)
    assert lifecycle.rollout("b").metadata == {"failure": {"kind": "unresponsive", "reason": "no span for 10.0 s"}}


def test_a_claim_that_is_never_started_comes_back() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    lease(lifecycle)
    lifecycle.tick(LEASE)
    assert lifecycle.rollout("a").status == "preparing"
    lifecycle.tick(LEASE + 0.1)
    assert lifecycle.rollout("a").status == "requeuing"
    assert (lifecycle.attempts("a")[0].metadata or {})["infrastructure"] is True


def test_heartbeats_renew_and_tell_what_to_stop() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b", "c")
    held = [(claim.rollout_id, claim.attempt.attempt_id) for claim in lifecycle.dequeue(3, "w", None, 0.0)]
    assert lifecycle.heartbeat("w", held, 50.0) == []
    lifecycle.tick(LEASE + 10.0)
    lifecycle.update("a", "cancelled", 70.0)
    lifecycle.finish("b", held[1][1], "timeout", None, 70.0)
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


def test_a_worker_can_report_a_failure_of_the_infrastructure() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a")
    told = {"infrastructure": True, "reason": "endpoint gone"}
    assert lifecycle.finish("a", lease(lifecycle), "failed", told, 1.0).status == "requeuing"
    assert lifecycle.finish("a", lease(lifecycle), "failed", None, 2.0).status == "failed"


def test_cancelling() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b")
    assert lifecycle.update("b", "cancelled", 1.0).status == "cancelled"
    attempt = lease(lifecycle)
    assert lifecycle.update("a", "cancelled", 2.0).end_time == 2.0
    assert lifecycle.finish("a", attempt, "succeeded", None, 3.0).status == "cancelled"
    assert lifecycle.dequeue(5, "w", None, 4.0) == []
    with pytest.raises(StoreError, match="running"):
        lifecycle.update("a", "running", 5.0)


def test_a_repeated_request_gets_its_claims_again() -> None:
    lifecycle = make()
    enqueue(lifecycle, "a", "b", "c")
    first = lifecycle.dequeue(2, "w", "rq-1", 0.0)
    assert lifecycle.dequeue(2, "w", "rq-1", 1.0) == first
    lifecycle.finish("a", first[0].attempt.attempt_id, "succeeded", None, 2.0)
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
            lifecycle.finish("a", "at-ghost", "succeeded", None, 1.0)
        elif refused == "status":
            lifecycle.finish("a", attempt, "running", None, 1.0)
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


class AnyHistory(RuleBasedStateMachine):
    """Whatever is called in whatever order, the invariants of the lifecycle hold."""

    @initialize()
    def start(self) -> None:
        self.lifecycle, self.now, self.events = make(), 0.0, []
        self.ended: dict[str, Any] = {}
        self.known: list[tuple[str, str, str]] = []
        enqueue(self.lifecycle, "a", "b", config=RETRY)

    @rule(
        name=st.sampled_from("abcdef"),
        timeout=st.sampled_from([None, 5.0, 100.0]),
        silent=st.sampled_from([None, 3.0]),
        attempts=st.integers(1, 3),
        retry=st.sets(st.sampled_from(sorted(TERMINAL_ATTEMPT - {"succeeded"}))),
    )
    def enqueue(self, name: str, timeout: Any, silent: Any, attempts: int, retry: set[Any]) -> None:
        config = RolloutConfig(
            timeout_seconds=timeout,
            unresponsive_seconds=silent,
            max_attempts=attempts,
            retry_condition=sorted(retry),
        )
        enqueue(self.lifecycle, name, now=self.now, config=config)

    @rule(limit=st.integers(1, 3), worker=st.sampled_from("xyz"), request=st.sampled_from([None, "r1", "r2"]))
    def dequeue(self, limit: int, worker: str, request: str | None) -> None:
        for claim in self.lifecycle.dequeue(limit, worker, request, self.now):
            assert claim.status in ("preparing", "running")
            self.known.append((claim.rollout_id, claim.attempt.attempt_id, worker))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), status=st.sampled_from(sorted(TERMINAL_ATTEMPT)), infrastructure=st.booleans())
    def finish(self, data: st.DataObject, status: str, infrastructure: bool) -> None:
        rollout_id, attempt_id, _ = data.draw(st.sampled_from(self.known))
        before = {attempt.attempt_id: attempt for attempt in self.lifecycle.attempts(rollout_id)}
        self.lifecycle.finish(rollout_id, attempt_id, status, {"infrastructure": infrastructure}, self.now)
        for attempt in self.lifecycle.attempts(rollout_id):
            others = attempt.attempt_id != attempt_id or before[attempt_id].status in TERMINAL_ATTEMPT
            assert attempt == before[attempt.attempt_id] if others else attempt.status == status

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def spans(self, data: st.DataObject) -> None:
        rollout_id, attempt_id, _ = data.draw(st.sampled_from(self.known))
        self.lifecycle.spans_arrived([(rollout_id, attempt_id, 0, 1)], self.now)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        rollout_id, attempt_id, worker = data.draw(st.sampled_from(self.known))
        self.lifecycle.heartbeat(worker, [(rollout_id, attempt_id)], self.now)

    @rule(worker=st.sampled_from("xyz"))
    def release(self, worker: str) -> None:
        self.lifecycle.release_worker(worker, "killed", self.now)

    @precondition(lambda self: self.lifecycle.state.rollouts)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.lifecycle.update(data.draw(st.sampled_from(sorted(self.lifecycle.state.rollouts))), "cancelled", self.now)

    @rule(seconds=st.sampled_from([0.5, 4.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.lifecycle.tick(self.now)

    @invariant()
    def holds(self) -> None:
        state = self.lifecycle.state
        for rollout_id, entry in state.rollouts.items():
            live = [attempt for attempt in entry.attempts if attempt.status not in TERMINAL_ATTEMPT]
            assert len(live) <= 1
            assert live == ([state.live[rollout_id].attempt] if rollout_id in state.live else [])
            assert not live or live[0] is entry.attempts[-1]
            assert entry.counted + len(live) <= entry.rollout.config.max_attempts
            assert entry.infrastructure <= MAX_INFRASTRUCTURE_FAILURES + 1
            assert (rollout_id in state.queue) == (entry.rollout.status in ("queuing", "requeuing"))
            assert (rollout_id in state.live) == (entry.rollout.status in ("preparing", "running"))
            if entry.rollout.status in TERMINAL_ROLLOUT:
                now = (entry.rollout.model_dump(), [attempt.model_dump() for attempt in entry.attempts])
                assert self.ended.setdefault(rollout_id, now) == now
            succeeded = [attempt for attempt in entry.attempts if attempt.status == "succeeded"]
            assert len(succeeded) == (entry.rollout.status == "succeeded")

    @invariant()
    def replay_ends_here(self) -> None:
        self.events += self.lifecycle.take_events()
        replayed = RunState()
        for event in unpack(pack(self.events, "events")):
            replayed.apply(event)
        mine = self.lifecycle.state
        assert list(replayed.queue) == list(mine.queue)
        assert replayed.live.keys() == mine.live.keys()
        assert replayed.statuses == mine.statuses
        assert replayed.requests.keys() == mine.requests.keys()
        soft = {"last_heartbeat_time"}
        for rollout_id, entry in mine.rollouts.items():
            other = replayed.rollouts[rollout_id]
            assert (other.rollout, other.counted, other.infrastructure) == (
                entry.rollout,
                entry.counted,
                entry.infrastructure,
            )
            assert [a.model_dump(exclude=soft) for a in other.attempts] == [
                a.model_dump(exclude=soft) for a in entry.attempts
            ]

    def teardown(self) -> None:
        """Left alone by all workers but one that always fails, every rollout comes to its end."""
        for _ in range(20):
            for claim in self.lifecycle.dequeue(100, "last", None, self.now):
                self.lifecycle.finish(claim.rollout_id, claim.attempt.attempt_id, "failed", None, self.now)
            self.now += LEASE + 1
            self.lifecycle.tick(self.now)
        assert {entry.rollout.status for entry in self.lifecycle.state.rollouts.values()} <= TERMINAL_ROLLOUT


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
