"""The rollout state machine against a small model under any history; a replay of its events ends where it stood."""

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
from lightning_ray.store.lifecycle import MAX_INFRASTRUCTURE_FAILURES, OWN_LOSS, SHARED_LOSS
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.state import RunState
from lightning_ray.types import (
    TERMINAL_ATTEMPT,
    TERMINAL_ROLLOUT,
    EnqueueRolloutRequest,
    RolloutConfig,
    RolloutStatus,
)
from tests.lifecycle_calls import LEASE, arrive, enqueue, finish, make


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
        keeps_turn = lost == SHARED_LOSS and not task.lost
        if lost and status != "succeeded":
            again = task.lost < MAX_INFRASTRUCTURE_FAILURES * OWN_LOSS
            task.lost += lost
        else:
            task.counted += 1
            again = status in task.config.retry_condition and task.counted < task.config.max_attempts
        self.settle(name, "succeeded" if status == "succeeded" else "requeuing" if again else "failed", status)
        if keeps_turn and again:
            self.queue.insert(0, self.queue.pop())

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
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40)
