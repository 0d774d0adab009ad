"""What the store knows of rollouts, attempts and resources: the fold of its events.

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
from lightning_ray.types import TERMINAL_ROLLOUT, Attempt, ResourcesUpdate, Rollout, RolloutStatus

_REMEMBERED_REQUESTS = 10_000


@dataclass(slots=True)
class RolloutEntry:
    """A rollout, its attempts in order, and how many of them ended by the agent's fault and by the
    infrastructure's.
    """

    rollout: Rollout
    attempts: list[Attempt] = field(default_factory=list)
    counted: int = 0
    infrastructure: int = 0


@dataclass(slots=True)
class Live:
    """The attempt at work on a rollout, when its worker was last heard of and when its last span came (Unix
    s).
    """

    attempt: Attempt
    last_seen: float
    last_span: float


class RunState:
    """The state of a run; fields are for reading."""

    def __init__(self) -> None:
        self.rollouts: dict[str, RolloutEntry] = {}
        self.live: dict[str, Live] = {}
        self.by_worker: defaultdict[str | None, set[str]] = defaultdict(set)
        self.queue: OrderedDict[str, None] = OrderedDict()
        self.requests: OrderedDict[str, list[tuple[str, str]]] = OrderedDict()
        self.resources: dict[str, ResourcesUpdate] = {}
        self.latest_resources_id: str | None = None
        self.statuses: Counter[str] = Counter()

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
        rollout = Rollout.model_validate({**event["rollout"], "start_time": event["time"], "status": "queuing"})
        self.rollouts[rollout.rollout_id] = RolloutEntry(rollout)
        self.statuses["queuing"] += 1
        self.queue[rollout.rollout_id] = None

    def _on_leased(self, event: Event) -> None:
        now, worker_id = event["time"], event["worker_id"]
        for rollout_id, attempt_id in event["claims"]:
            entry = self.rollouts[rollout_id]
            del self.queue[rollout_id]
            attempt = Attempt(
                rollout_id=rollout_id,
                attempt_id=attempt_id,
                sequence_id=len(entry.attempts) + 1,
                start_time=now,
                worker_id=worker_id,
            )
            entry.attempts.append(attempt)
            self.live[rollout_id] = Live(attempt, last_seen=now, last_span=now)
            self.by_worker[worker_id].add(rollout_id)
            self._set_status(entry.rollout, "preparing")
        if event["request_id"] is not None:
            self.requests[event["request_id"]] = [
                (rollout_id, attempt_id) for rollout_id, attempt_id in event["claims"]
            ]
            if len(self.requests) > _REMEMBERED_REQUESTS:
                self.requests.popitem(last=False)

    def _on_spans(self, event: Event) -> None:
        for rollout_id, attempt_id, _start, _count in event["runs"]:
            live = self.live.get(rollout_id)
            if live is None or live.attempt.attempt_id != attempt_id:
                continue
            live.last_seen = live.last_span = live.attempt.last_heartbeat_time = event["time"]
            if live.attempt.status == "preparing":
                live.attempt.status = "running"
                self._set_status(self.rollouts[rollout_id].rollout, "running")

    def _on_ended(self, event: Event) -> None:
        entry = self.rollouts[event["rollout_id"]]
        attempt = self._end_live(event, event["status"])
        if event["metadata"]:
            attempt.metadata = {**(attempt.metadata or {}), **event["metadata"]}
        if event["infrastructure"]:
            entry.infrastructure += 1
        else:
            entry.counted += 1
        self._follow(entry.rollout, event)

    def _on_cancelled(self, event: Event) -> None:
        self.queue.pop(event["rollout_id"], None)
        if event["rollout_id"] in self.live:
            attempt = self._end_live(event, "failed")
            attempt.metadata = {**(attempt.metadata or {}), "reason": "cancelled"}
        self._follow(self.rollouts[event["rollout_id"]].rollout, event)

    def _on_reopened(self, event: Event) -> None:
        for live in self.live.values():
            live.last_seen = live.last_span = event["time"]

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

    def _end_live(self, event: Event, status: Any) -> Attempt:
        attempt = self.live.pop(event["rollout_id"]).attempt
        held = self.by_worker[attempt.worker_id]
        held.discard(event["rollout_id"])
        if not held:
            del self.by_worker[attempt.worker_id]
        attempt.status, attempt.end_time = status, event["time"]
        return attempt

    def _follow(self, rollout: Rollout, event: Event) -> None:
        status = event["rollout_status"]
        self._set_status(rollout, status)
        if event.get("failure"):
            rollout.metadata = {**(rollout.metadata or {}), "failure": event["failure"]}
        if status in TERMINAL_ROLLOUT:
            rollout.end_time = event["time"]
        else:
            self.queue[rollout.rollout_id] = None

    def _set_status(self, rollout: Rollout, status: RolloutStatus) -> None:
        self.statuses[rollout.status] -= 1
        self.statuses[status] += 1
        rollout.status = status
