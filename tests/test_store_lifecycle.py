"""The rollout state machine, with a given clock and no disk: case by case, and against a small model under any
history; a replay of its events ends where it stood.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_ray.errors import StoreError
from lightning_ray.store.lifecycle import MAX_INFRASTRUCTURE_FAILURES, OWN_LOSS, SEQUENCE_BLOCK, SHARED_LOSS, Lifecycle
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.state import RunState
from lightning_ray.types import (
    LLM,
    TERMINAL_ATTEMPT,
    TERMINAL_ROLLOUT,
    Attempt,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
    RolloutStatus,
)

LEASE = 60.0
RETRY = RolloutConfig(max_attempts=2, retry_condition=["failed", "timeout", "unresponsive"])


def make() -> Lifecycle:
    numbers = count()
    return Lifecycle(LEASE, lambda prefix: f"{prefix}-{next(numbers)}")


def enqueue(lifecycle: Lifecycle, *ids: str, now: float = 0.0, config: RolloutConfig | None = None) -> None:
    requests = [EnqueueRolloutRequest(rollout_id=rollout_id, input={"q": 1}, config=config) for rollout_id in ids]
    lifecycle.enqueue(requests, now)


def finish(lifecycle: Lifecycle, rollout_id: str, attempt_id: str, status: str, metadata: Any, now: float) -> Rollout:
    return lifecycle.finish([(rollout_id, attempt_id, status, metadata)], now)[0]


def attempts(lifecycle: Lifecycle, rollout_id: str) -> list[Attempt]:
    return [attempt.model_copy() for attempt in lifecycle.state.rollouts[rollout_id].attempts]


def arrive(lifecycle: Lifecycle, rollout_id: str, attempt_id: str, now: float, last: int = 0) -> None:
    last = last or lifecycle.last_sequence(rollout_id) + 1
    lifecycle.spans_arrived([(rollout_id, attempt_id, 0, 1, last, last)], now)


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


# --- any history ----------------------------------------------------------------------------------------------


@dataclass
class Try:
    """An attempt in the model."""

    attempt_id: str
    worker: str | None
    leased: bool
    begun: float
    seen: float
    status: str = "preparing"


@dataclass
class Task:
    """A rollout in the model."""

    config: RolloutConfig
    status: str = "queuing"
    tries: list[Try] = field(default_factory=list)
    counted: int = 0
    lost: int = 0
    numbered: int = 0

    @property
    def live(self) -> Try | None:
        return self.tries[-1] if self.tries and self.tries[-1].status not in TERMINAL_ATTEMPT else None


class Model:
    """The contract in the fewest words: tasks, a queue, and what is at work in the order in which it began."""

    def __init__(self) -> None:
        self.tasks: dict[str, Task] = {}
        self.queue: list[str] = []
        self.working: list[str] = []

    def begin(self, name: str, attempt_id: str, worker: str | None, leased: bool, now: float) -> None:
        task = self.tasks[name]
        if name in self.queue:
            self.queue.remove(name)
        task.tries.append(Try(attempt_id, worker, leased, now, now))
        task.status = "preparing"
        self.working.append(name)

    def end(self, name: str, status: str, lost: int) -> None:
        """``lost`` is what a failure of the infrastructure weighs."""
        task = self.tasks[name]
        if lost and status != "succeeded":
            again = task.lost < MAX_INFRASTRUCTURE_FAILURES * OWN_LOSS
            task.lost += lost
        else:
            task.counted += 1
            again = status in task.config.retry_condition and task.counted < task.config.max_attempts
        self.settle(name, "succeeded" if status == "succeeded" else "requeuing" if again else "failed", status)

    def settle(self, name: str, status: str, attempt_status: str) -> None:
        task = self.tasks[name]
        if task.live is not None:
            task.live.status = attempt_status
            self.working.remove(name)
        task.status = status
        if status in TERMINAL_ROLLOUT and name in self.queue:
            self.queue.remove(name)
        if status not in TERMINAL_ROLLOUT and name not in self.queue:
            self.queue.append(name)

    def tick(self, now: float) -> None:
        held = Counter(task.live.worker for task in self.tasks.values() if task.live is not None)
        for name in list(self.working):
            task, live = self.tasks[name], self.tasks[name].live
            assert live is not None
            timeout, silent = task.config.timeout_seconds, task.config.unresponsive_seconds
            if timeout is not None and now - live.begun > timeout:
                self.end(name, "timeout", 0)
            elif silent is not None and now - live.seen > silent:
                self.end(name, "unresponsive", 0)
            elif live.leased and now - live.seen > LEASE:
                self.end(name, "failed", SHARED_LOSS if held[live.worker] > 1 else OWN_LOSS)


NAMES = st.sampled_from("abcdef")
WORKERS = st.sampled_from([None, "x", "y"])


class AnyHistory(RuleBasedStateMachine):
    """Whatever is called in whatever order, the lifecycle stands where the model stands."""

    def __init__(self) -> None:
        super().__init__()
        self.lifecycle, self.model, self.now, self.events = make(), Model(), 0.0, []
        self.numbers = count()
        self.ended: dict[str, Any] = {}
        self.known: list[tuple[str, str]] = []
        self.requests: dict[str, list[tuple[str, str]]] = {}

    @rule(
        name=NAMES,
        timeout=st.sampled_from([None, 5.0, 100.0]),
        silent=st.sampled_from([None, 3.0]),
        most=st.integers(1, 3),
        retry=st.sets(st.sampled_from(sorted(TERMINAL_ATTEMPT - {"succeeded"}))),
        start=st.booleans(),
        worker=WORKERS,
    )
    def create(
        self, name: str, timeout: Any, silent: Any, most: int, retry: set[Any], start: bool, worker: Any
    ) -> None:
        config = RolloutConfig(
            timeout_seconds=timeout, unresponsive_seconds=silent, max_attempts=most, retry_condition=sorted(retry)
        )
        is_new = name not in self.model.tasks
        if not start:
            enqueue(self.lifecycle, name, now=self.now, config=config)
            if is_new:
                self.model.tasks[name] = Task(config)
                self.model.queue.append(name)
        elif is_new:
            request = EnqueueRolloutRequest(rollout_id=name, input=1, config=config)
            attempt_id = f"started-{next(self.numbers)}"
            started = self.lifecycle.start(request, attempt_id, worker, self.now)
            assert self.lifecycle.start(request, attempt_id, worker, self.now) == started
            self.model.tasks[name] = Task(config)
            self.model.begin(name, attempt_id, worker, worker is not None, self.now)
            self.known.append((name, attempt_id))

    @rule(name=NAMES, worker=WORKERS)
    def start_attempt(self, name: str, worker: Any) -> None:
        attempt_id = f"started-{next(self.numbers)}"
        task = self.model.tasks.get(name)
        if task is None or task.status in TERMINAL_ROLLOUT:
            with pytest.raises(StoreError, match=name):
                self.lifecycle.start_attempt(name, attempt_id, worker, self.now)
            return
        self.lifecycle.start_attempt(name, attempt_id, worker, self.now)
        if task.live is not None:
            self.model.settle(name, "requeuing", "failed")
        self.model.begin(name, attempt_id, worker, worker is not None, self.now)
        self.known.append((name, attempt_id))

    @rule(limit=st.integers(0, 3), worker=WORKERS, request=st.sampled_from([None, "r1", "r2"]))
    def dequeue(self, limit: int, worker: Any, request: str | None) -> None:
        claims = [
            (claim.rollout_id, claim.attempt.attempt_id)
            for claim in self.lifecycle.dequeue(limit, worker, request, self.now)
        ]
        if request in self.requests:
            assert claims == [pair for pair in self.requests[request] if self.is_live(*pair)]
            return
        assert [name for name, _ in claims] == self.model.queue[:limit]
        for name, attempt_id in claims:
            self.model.begin(name, attempt_id, worker, True, self.now)
        self.known += claims
        if claims and request is not None:
            self.requests[request] = claims

    @precondition(lambda self: self.known)
    @rule(data=st.data(), status=st.sampled_from(sorted(TERMINAL_ATTEMPT)), lost=st.booleans(), update=st.booleans())
    def finish(self, data: st.DataObject, status: str, lost: bool, update: bool) -> None:
        name, attempt_id = data.draw(st.sampled_from(self.known))
        was_live = self.is_live(name, attempt_id)
        if update:
            changes = {"status": status, "metadata": {"infrastructure": lost}}
            self.lifecycle.update_attempt(name, attempt_id, changes, self.now)
        else:
            finish(self.lifecycle, name, attempt_id, status, {"infrastructure": lost}, self.now)
        if was_live:
            self.model.end(name, status, OWN_LOSS * lost)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), status=st.sampled_from(["preparing", "running"]), worker=WORKERS)
    def update_attempt(self, data: st.DataObject, status: str, worker: Any) -> None:
        name, attempt_id = data.draw(st.sampled_from(self.known))
        self.lifecycle.update_attempt(name, attempt_id, {"status": status, "worker_id": worker}, self.now)
        task = self.model.tasks[name]
        if task.live is not None and task.live.attempt_id == attempt_id:
            task.live.status = task.status = status
            task.live.worker, task.live.seen = worker, self.now

    @precondition(lambda self: self.model.tasks)
    @rule(data=st.data(), status=st.sampled_from(get_args(RolloutStatus)))
    def update_rollout(self, data: st.DataObject, status: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.tasks)))
        task = self.model.tasks[name]
        works = status in ("preparing", "running")
        if works and task.live is None and task.status not in TERMINAL_ROLLOUT:
            with pytest.raises(StoreError, match="no attempt at work"):
                self.lifecycle.update_rollout(name, {"status": status}, self.now)
            return
        self.lifecycle.update_rollout(name, {"status": status, "metadata": {"set": status}}, self.now)
        if task.status in TERMINAL_ROLLOUT or task.status == status:
            return
        if works and task.live is not None:
            task.live.status = task.status = status
            task.live.seen = self.now
        else:
            self.model.settle(name, status, "succeeded" if status == "succeeded" else "failed")

    @precondition(lambda self: self.known)
    @rule(data=st.data(), numbers=st.integers(0, 100), explicit=st.sampled_from([0, 0, 7, 500]))
    def spans(self, data: st.DataObject, numbers: int, explicit: int) -> None:
        name, attempt_id = data.draw(st.sampled_from(self.known))
        task = self.model.tasks[name]
        given = self.lifecycle.next_sequences([(name, attempt_id)] * numbers, self.now)
        assert given == list(range(task.numbered + 1, task.numbered + numbers + 1))
        task.numbered += numbers
        task.numbered = max(task.numbered, explicit) if explicit else task.numbered + 1
        assert explicit or self.lifecycle.last_sequence(name) + 1 == task.numbered
        arrive(self.lifecycle, name, attempt_id, self.now, task.numbered)
        if self.is_live(name, attempt_id):
            assert task.live is not None
            task.live.seen = self.now
            if task.live.status == "preparing":
                task.live.status = task.status = "running"

    @precondition(lambda self: self.known)
    @rule(data=st.data(), worker=st.sampled_from("xyz"))
    def heartbeat(self, data: st.DataObject, worker: str) -> None:
        pair = data.draw(st.sampled_from(self.known))
        live = self.model.tasks[pair[0]].live
        mine = self.is_live(*pair) and live is not None and live.worker in (worker, None)
        assert self.lifecycle.heartbeat(worker, [pair], self.now) == ([] if mine else [pair])
        if mine and live is not None:
            live.seen = self.now

    @rule(worker=st.sampled_from("xyz"), stats=st.sampled_from([None, {"cpu": 1}]))
    def update_worker(self, worker: str, stats: Any) -> None:
        told = self.lifecycle.update_worker(worker, stats, self.now)
        held = [task.live for task in self.model.tasks.values() if task.live and task.live.worker == worker]
        assert (told.status == "busy") == bool(held)
        for live in held:
            live.seen = self.now

    @rule(worker=st.sampled_from("xyz"))
    def release(self, worker: str) -> None:
        held = sorted(
            name for name, task in self.model.tasks.items() if task.live is not None and task.live.worker == worker
        )
        assert self.lifecycle.release_worker(worker, "killed", self.now) == held
        for name in held:
            self.model.end(name, "failed", SHARED_LOSS if len(held) > 1 else OWN_LOSS)

    @rule(names=st.sets(NAMES, max_size=2))
    def delete(self, names: set[str]) -> None:
        there = [name for name in sorted(names) if name in self.model.tasks]
        assert self.lifecycle.delete(sorted(names), self.now) == there
        for name in there:
            if name in self.model.working:
                self.model.working.remove(name)
            if name in self.model.queue:
                self.model.queue.remove(name)
            del self.model.tasks[name]
            self.ended.pop(name, None)
        self.known = [pair for pair in self.known if pair[0] not in there]

    @rule(seconds=st.sampled_from([0.5, 4.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.lifecycle.tick(self.now)
        self.model.tick(self.now)

    def is_live(self, name: str, attempt_id: str) -> bool:
        task = self.model.tasks.get(name)
        return task is not None and task.live is not None and task.live.attempt_id == attempt_id

    @invariant()
    def stands_where_the_model_stands(self) -> None:
        state = self.lifecycle.state
        assert list(state.queue) == self.model.queue
        assert list(state.live) == self.model.working
        assert list(state.rollouts) == list(self.model.tasks)
        assert +state.statuses == Counter(task.status for task in self.model.tasks.values())
        assert state.attempts == sum(len(task.tries) for task in self.model.tasks.values())
        for name, task in self.model.tasks.items():
            entry = state.rollouts[name]
            assert (entry.rollout.status, entry.counted, entry.infrastructure) == (task.status, task.counted, task.lost)
            assert [(attempt.attempt_id, attempt.status) for attempt in entry.attempts] == [
                (one.attempt_id, one.status) for one in task.tries
            ]
            assert [attempt.sequence_id for attempt in entry.attempts] == list(range(1, len(task.tries) + 1))
            assert (entry.rollout.end_time is not None) == (task.status in TERMINAL_ROLLOUT)
            for attempt in entry.attempts:
                assert (attempt.end_time is not None) == (attempt.status in TERMINAL_ATTEMPT)
            if task.status in TERMINAL_ROLLOUT:
                now = (entry.rollout.status, entry.rollout.end_time, [dict(attempt) for attempt in entry.attempts])
                for attempt in now[2]:
                    del attempt["metadata"]
                assert self.ended.setdefault(name, now) == now

    @invariant()
    def workers_are_busy_with_what_they_hold(self) -> None:
        state = self.lifecycle.state
        for worker_id, worker in state.workers.items():
            held = {name for name, task in self.model.tasks.items() if task.live and task.live.worker == worker_id}
            assert state.by_worker.get(worker_id, {}).keys() == held
            assert (worker.status == "busy") == bool(held)
            assert (worker.current_rollout_id in held) if held else (worker.current_rollout_id is None)

    @invariant()
    def a_replay_ends_here(self) -> None:
        self.events += self.lifecycle.take_events()
        replayed, mine = RunState(), self.lifecycle.state
        for event in unpack(pack(self.events, "events")):
            replayed.apply(event)
        assert list(replayed.queue) == list(mine.queue)
        assert list(replayed.live) == list(mine.live)
        assert +replayed.statuses == +mine.statuses
        assert (replayed.requests, replayed.attempts, replayed.serial) == (mine.requests, mine.attempts, mine.serial)
        assert replayed.workers.keys() == mine.workers.keys()
        assert [live.leased for live in replayed.live.values()] == [live.leased for live in mine.live.values()]
        for name, entry in mine.rollouts.items():
            other = replayed.rollouts[name]
            assert (other.rollout, other.serial, other.sequence) == (entry.rollout, entry.serial, entry.sequence)
            assert (other.counted, other.infrastructure) == (entry.counted, entry.infrastructure)
            assert [attempt.model_dump(exclude=SOFT) for attempt in other.attempts] == [
                attempt.model_dump(exclude=SOFT) for attempt in entry.attempts
            ]

    def teardown(self) -> None:
        """Left alone by all workers but one that always fails, every leased rollout comes to its end."""
        for _ in range(20):
            for claim in self.lifecycle.dequeue(100, "last", None, self.now):
                finish(self.lifecycle, claim.rollout_id, claim.attempt.attempt_id, "failed", None, self.now)
            self.now += LEASE + 1
            self.lifecycle.tick(self.now)
        for rollout_id, entry in self.lifecycle.state.rollouts.items():
            live = self.lifecycle.state.live.get(rollout_id)
            assert entry.rollout.status in TERMINAL_ROLLOUT or (live is not None and not live.leased)


SOFT = {"last_heartbeat_time"}
TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
