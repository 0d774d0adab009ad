"""What the store knows of rollouts, attempts, workers and resources: the fold of its events.

``RunState.apply`` is the only thing that changes the state, whether an event was just decided or comes from
the log, so a replay ends where the run stood. Events state facts (who got what, what a rollout became) and
never have to be decided again. At most one attempt of a rollout is live, and it is the last. Signs of life
are soft: they are not logged, and ``reopened`` renews them. Deciding is the lifecycle's matter.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.store.log import Event
from lightning_ray.types import TERMINAL_ROLLOUT, Attempt, ResourcesUpdate, Rollout, RolloutStatus, Worker

_REMEMBERED_REQUESTS = 10_000
_LOST_SIGHT = frozenset({"timeout", "unresponsive"})


@dataclass(slots=True)
class RolloutEntry:
    """A rollout and its attempts in order.

    ``serial`` counts rollouts as they came; ``sequence`` is the last span number given; ``counted`` and
    ``infrastructure`` are how many attempts ended by the agent's fault, and what those weigh that the infrastructure's
    failures ended.
    """

    rollout: Rollout
    serial: int
    attempts: list[Attempt] = field(default_factory=list)
    sequence: int = 0
    counted: int = 0
    infrastructure: int = 0


@dataclass(slots=True)
class Live:
    """The attempt at work on a rollout, and when it last gave a sign of life: a span, a heartbeat (Unix s).

    ``leased`` attempts are taken back from silent workers.
    """

    attempt: Attempt
    last_seen: float
    leased: bool = True


class RunState:
    """The state of a run; fields are for reading."""

    def __init__(self) -> None:
        self.rollouts: dict[str, RolloutEntry] = {}
        self.live: dict[str, Live] = {}
        self.by_worker: defaultdict[str | None, dict[str, str]] = defaultdict(dict)
        """Live attempts by worker: rollout id -> attempt id, oldest first."""
        self.queue: OrderedDict[str, None] = OrderedDict()
        self.requests: OrderedDict[str, list[tuple[str, str]]] = OrderedDict()
        self.resources: dict[str, ResourcesUpdate] = {}
        self.latest_resources_id: str | None = None
        self.workers: dict[str, Worker] = {}
        self.statuses: Counter[str] = Counter()
        self.attempts = 0
        self.serial = 0

    def apply(self, event: Event) -> None:
        """Fold one event in."""
        getattr(self, f"_on_{event['kind']}")(event)

    def attempt(self, rollout_id: str, attempt_id: str) -> Attempt | None:
        """The attempt, or None if either id is unknown."""
        entry = self.rollouts.get(rollout_id)
        if entry is None:
            return None
        return next((attempt for attempt in reversed(entry.attempts) if attempt.attempt_id == attempt_id), None)

    def _on_enqueued(self, event: Event) -> None:
        self._create(event)
        self.queue[event["rollout"]["rollout_id"]] = None

    def _on_leased(self, event: Event) -> None:
        now, worker_id = event["time"], event["worker_id"]
        for rollout_id, attempt_id in event["claims"]:
            self._begin(rollout_id, attempt_id, worker_id, now, leased=True)
        if worker_id is not None:
            self._worker(worker_id).last_dequeue_time = now
        if event["request_id"] is not None:
            self.requests[event["request_id"]] = [
                (rollout_id, attempt_id) for rollout_id, attempt_id in event["claims"]
            ]
            if len(self.requests) > _REMEMBERED_REQUESTS:
                self.requests.popitem(last=False)

    def _on_started(self, event: Event) -> None:
        if event["rollout"] is not None:
            self._create(event)
        self._begin(event["rollout_id"], event["attempt_id"], event["worker_id"], event["time"], leased=event["leased"])

    def _on_spans(self, event: Event) -> None:
        for rollout_id, attempt_id, _start, _count, _sequence, last in event["runs"]:
            entry = self.rollouts[rollout_id]
            entry.sequence = max(entry.sequence, last)
            live = self.live.get(rollout_id)
            if live is None or live.attempt.attempt_id != attempt_id:
                continue
            live.last_seen = live.attempt.last_heartbeat_time = event["time"]
            if live.attempt.status == "preparing":
                live.attempt.status = "running"
                self._set_status(entry.rollout, "running")

    def _on_sequences(self, event: Event) -> None:
        for rollout_id, last in event["last"].items():
            entry = self.rollouts[rollout_id]
            entry.sequence = max(entry.sequence, last)

    def _on_ended(self, event: Event) -> None:
        entry = self.rollouts[event["rollout_id"]]
        attempt = self._end_live(event, event["status"])
        if event["metadata"]:
            attempt.metadata = {**(attempt.metadata or {}), **event["metadata"]}
        if event["infrastructure"]:
            entry.infrastructure += event["infrastructure"]
        else:
            entry.counted += 1
        self._follow(entry.rollout, event)

    def _on_settled(self, event: Event) -> None:
        """A rollout's status was set from outside; a live attempt ends with it."""
        if event["rollout_id"] in self.live:
            attempt = self._end_live(event, event["status"])
            attempt.metadata = {**(attempt.metadata or {}), "reason": event["reason"]}
        self._follow(self.rollouts[event["rollout_id"]].rollout, event)

    def _on_updated(self, event: Event) -> None:
        """Fields of a rollout other than its status."""
        entry = self.rollouts[event["rollout_id"]]
        entry.rollout = Rollout.model_validate({**dict(entry.rollout), **event["changes"]})

    def _on_attempt_updated(self, event: Event) -> None:
        """Worker, metadata, or a live attempt's status short of its end."""
        rollout_id, changes = event["rollout_id"], event["changes"]
        attempt = self.attempt(rollout_id, event["attempt_id"])
        live = self.live.get(rollout_id)
        if attempt is None:
            return
        if "metadata" in changes:
            attempt.metadata = changes["metadata"]
        if live is None or live.attempt is not attempt:
            return
        live.last_seen = attempt.last_heartbeat_time = event["time"]
        if "worker_id" in changes and changes["worker_id"] != attempt.worker_id:
            self._let_go(attempt, "idle", event["time"])
            attempt.worker_id = changes["worker_id"]
            self._take(attempt, event["time"])
        if "status" in changes:
            attempt.status = changes["status"]
            self._set_status(self.rollouts[rollout_id].rollout, changes["status"])

    def _on_worker(self, event: Event) -> None:
        worker = self._worker(event["worker_id"])
        worker.last_heartbeat_time = event["time"]
        if event["heartbeat_stats"] is not None:
            worker.heartbeat_stats = event["heartbeat_stats"]

    def _on_reopened(self, event: Event) -> None:
        for live in self.live.values():
            live.last_seen = event["time"]

    def _on_resources(self, event: Event) -> None:
        resources_id, now = event["resources_id"], event["time"]
        before = self.resources.get(resources_id)
        self.resources[resources_id] = ResourcesUpdate(
            resources_id=resources_id,
            create_time=before.create_time if before else now,
            update_time=now,
            version=event["version"],
            resources=event["resources"],
        )
        self.latest_resources_id = resources_id

    def _on_deleted(self, event: Event) -> None:
        for rollout_id in event["rollout_ids"]:
            if rollout_id in self.live:
                self._end_live({**event, "rollout_id": rollout_id}, "failed")
            self.queue.pop(rollout_id, None)
            entry = self.rollouts.pop(rollout_id)
            self.statuses[entry.rollout.status] -= 1
            self.attempts -= len(entry.attempts)

    def _create(self, event: Event) -> None:
        rollout = Rollout.model_validate({**event["rollout"], "start_time": event["time"], "status": "queuing"})
        self.serial += 1
        self.rollouts[rollout.rollout_id] = RolloutEntry(rollout, self.serial)
        self.statuses["queuing"] += 1

    def _begin(self, rollout_id: str, attempt_id: str, worker_id: str | None, now: float, *, leased: bool) -> None:
        entry = self.rollouts[rollout_id]
        self.queue.pop(rollout_id, None)
        attempt = Attempt(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=len(entry.attempts) + 1,
            start_time=now,
            worker_id=worker_id,
        )
        entry.attempts.append(attempt)
        self.attempts += 1
        self.live[rollout_id] = Live(attempt, last_seen=now, leased=leased)
        self._take(attempt, now)
        self._set_status(entry.rollout, "preparing")

    def _end_live(self, event: Event, status: Any) -> Attempt:
        attempt = self.live.pop(event["rollout_id"]).attempt
        attempt.status, attempt.end_time = status, event["time"]
        self._let_go(attempt, "unknown" if status in _LOST_SIGHT else "idle", event["time"])
        return attempt

    def _follow(self, rollout: Rollout, event: Event) -> None:
        status = event["rollout_status"]
        self._set_status(rollout, status)
        if event.get("failure"):
            rollout.metadata = {**(rollout.metadata or {}), "failure": event["failure"]}
        if status in TERMINAL_ROLLOUT:
            rollout.end_time = event["time"]
            self.queue.pop(rollout.rollout_id, None)
        else:
            self.queue[rollout.rollout_id] = None
            if event.get("keeps_turn"):
                self.queue.move_to_end(rollout.rollout_id, last=False)

    def _set_status(self, rollout: Rollout, status: RolloutStatus) -> None:
        self.statuses[rollout.status] -= 1
        self.statuses[status] += 1
        rollout.status = status

    def _worker(self, worker_id: str) -> Worker:
        return self.workers.setdefault(worker_id, Worker(worker_id=worker_id))

    def _take(self, attempt: Attempt, now: float) -> None:
        self.by_worker[attempt.worker_id][attempt.rollout_id] = attempt.attempt_id
        if attempt.worker_id is None:
            return
        worker = self._worker(attempt.worker_id)
        worker.status, worker.last_busy_time = "busy", now
        worker.current_rollout_id, worker.current_attempt_id = attempt.rollout_id, attempt.attempt_id

    def _let_go(self, attempt: Attempt, status: Any, now: float) -> None:
        held = self.by_worker[attempt.worker_id]
        held.pop(attempt.rollout_id, None)
        if not held:
            del self.by_worker[attempt.worker_id]
        if attempt.worker_id is None:
            return
        worker = self._worker(attempt.worker_id)
        if held:
            worker.current_rollout_id, worker.current_attempt_id = next(reversed(held.items()))
            return
        worker.status, worker.current_rollout_id, worker.current_attempt_id = status, None, None
        if status == "idle":
            worker.last_idle_time = now
