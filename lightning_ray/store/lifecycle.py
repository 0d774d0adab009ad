"""The rollout state machine: what each call decides, given the state and the time.

    queuing -> preparing (leased) -> running (first span) -> succeeded | failed | cancelled
                    ^ requeuing <- failed, timeout, unresponsive, if RolloutConfig retries them;
                                   and infrastructure failures, which do not count, up to 5 times;
                                   one that several rollouts had together is a fifth of one for each

Terminal states of rollouts and attempts are final: what comes later changes nothing. Every call may be
resent. Pure: it neither reads a clock nor writes; each decision is an event, applied at once and handed out
by ``take_events`` to be logged.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from lightning_ray.errors import StoreError
from lightning_ray.store.changes import attempt_changes, plain, rollout_changes
from lightning_ray.store.deadlines import Deadlines
from lightning_ray.store.log import Event
from lightning_ray.store.reading import attempted
from lightning_ray.store.state import Live, RolloutEntry, RunState
from lightning_ray.types import (
    TERMINAL_ATTEMPT,
    TERMINAL_ROLLOUT,
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    NamedResources,
    ResourcesUpdate,
    Rollout,
    Worker,
)

MAX_INFRASTRUCTURE_FAILURES = 5
"""How often a rollout is queued again because a worker, not the agent, failed."""

OWN_LOSS, SHARED_LOSS = 5, 1
"""What a failure weighs that a rollout had alone, and one of a worker that was at others too: hardly its doing."""

INFRASTRUCTURE = "infrastructure"
"""Key of an attempt's metadata that is true when the infrastructure failed, not the agent."""

SEQUENCE_BLOCK = 64
"""Numbers reserved in the log at once: after a restart the store goes on behind them."""

_DELETED_AT_ONCE = 10_000
_GREATEST_SEQUENCE = 2**31 - 1
Run = tuple[str, str, int, int, int, int]
Ending = tuple[str, str, str, Mapping[str, Any] | None]
"""How an attempt ended: rollout id, attempt id, status, metadata."""


def new_id(prefix: str) -> str:
    """A fresh id such as ``ro-`` and 16 hex digits."""
    return f"{prefix}-{secrets.token_hex(8)}"


class Lifecycle:
    """Decides on rollouts. ``now`` is Unix seconds.

    ``lease_seconds`` is how long a worker may be silent about an attempt: no span of it, no heartbeat.
    Rollouts that ended ``retention_seconds`` ago are deleted.
    """

    def __init__(
        self,
        lease_seconds: float = 60.0,
        make_id: Callable[[str], str] = new_id,
        *,
        retention_seconds: float | None = None,
        state: RunState | None = None,
    ) -> None:
        self.state = state or RunState()
        self._lease_seconds = lease_seconds
        self._retention_seconds = retention_seconds
        self._make_id = make_id
        self._events: list[Event] = []
        self._given: dict[str, int] = {}
        """The last span number given of rollouts that have more of them reserved."""
        self._ended: deque[tuple[float, str]] = deque()
        """When rollouts ended, oldest first; kept for retention only."""
        self._deadlines = Deadlines()
        if retention_seconds is not None:
            ends = ((entry.rollout.end_time, rollout_id) for rollout_id, entry in self.state.rollouts.items())
            self._ended.extend(sorted((end, rollout_id) for end, rollout_id in ends if end is not None))

    def take_events(self) -> list[Event]:
        """The events since the last call, in order; they are to be logged as one record."""
        events, self._events = self._events, []
        return events

    def reopened(self, now: float) -> None:
        """Give live attempts found in a log a fresh lease."""
        if self.state.live:
            self._emit("reopened", now)
        for rollout_id in self.state.live:
            self._watch(rollout_id, now)

    # --- create and claim -----------------------------------------------------------------------------------

    def enqueue(self, requests: Sequence[EnqueueRolloutRequest], now: float) -> list[Rollout]:
        """Queue rollouts; one whose id is known is answered as it is. StoreError for unknown resources."""
        planned = [self._plan(request) for request in requests]
        for rollout in planned:
            if rollout["rollout_id"] not in self.state.rollouts:
                self._emit("enqueued", now, rollout=rollout)
        return [self.rollout(rollout["rollout_id"]) for rollout in planned]

    def start(
        self, request: EnqueueRolloutRequest, attempt_id: str, worker_id: str | None, now: float
    ) -> AttemptedRollout:
        """Create a rollout and begin an attempt of it, past the queue; a known rollout gets a further attempt."""
        if request.rollout_id in self.state.rollouts:
            return self.start_attempt(request.rollout_id, attempt_id, worker_id, now)
        rollout = self._plan(request)
        self._start(rollout["rollout_id"], attempt_id, worker_id, now, rollout)
        return self._attempted(rollout["rollout_id"], attempt_id)

    def start_attempt(self, rollout_id: str, attempt_id: str, worker_id: str | None, now: float) -> AttemptedRollout:
        """Begin an attempt, past the queue and the number of attempts; a known one is answered as it is."""
        entry = self._entry(rollout_id)
        if self.state.attempt(rollout_id, attempt_id) is None:
            if entry.rollout.status in TERMINAL_ROLLOUT:
                raise StoreError(
                    f"rollout {rollout_id!r} has ended ({entry.rollout.status}) and takes no further attempt; enqueue "
                    "another rollout"
                )
            if rollout_id in self.state.live:
                self._settle(rollout_id, "requeuing", f"superseded by attempt {attempt_id}", now)
            self._start(rollout_id, attempt_id, worker_id, now)
        return self._attempted(rollout_id, attempt_id)

    def dequeue(self, limit: int, worker_id: str | None, request_id: str | None, now: float) -> list[AttemptedRollout]:
        """Lease up to ``limit`` queued rollouts, oldest first; before them what a lost worker played.

        A repeated ``request_id`` gets its claims again, as far as they are still at work.
        """
        if request_id is not None and request_id in self.state.requests:
            claims = self.state.requests[request_id]
            return [self._attempted(*claim) for claim in claims if self._is_live(*claim)]
        claimed = list(islice(self.state.queue, max(limit, 0)))
        if not claimed:
            self._note_empty_handed(worker_id, now)
            return []
        claims = [(rollout_id, self._make_id("at")) for rollout_id in claimed]
        self._emit("leased", now, worker_id=worker_id, request_id=request_id, claims=claims)
        for rollout_id in claimed:
            self._watch(rollout_id, now)
        return [self._attempted(*claim) for claim in claims]

    # --- spans ----------------------------------------------------------------------------------------------

    def last_sequence(self, rollout_id: str) -> int:
        """The last span number given or seen; the store's own spans go on from there."""
        return self._given.get(rollout_id, self.state.rollouts[rollout_id].sequence)

    def next_sequences(self, pairs: Sequence[tuple[str, str]], now: float) -> list[int]:
        """The next span number for each (rollout, attempt) id. They are reserved in blocks, so that no number
        comes twice, whatever happens.
        """
        for rollout_id, attempt_id in pairs:
            self._known_attempt(rollout_id, attempt_id)
        reserved = {}
        for rollout_id, count in Counter(rollout_id for rollout_id, _ in pairs).items():
            given = self._given.setdefault(rollout_id, self.last_sequence(rollout_id))
            if given + count > self.state.rollouts[rollout_id].sequence:
                reserved[rollout_id] = given + max(count, SEQUENCE_BLOCK)
        if reserved:
            self._emit("sequences", now, last=reserved)
        numbers = []
        for rollout_id, _ in pairs:
            self._given[rollout_id] += 1
            numbers.append(self._given[rollout_id])
        return numbers

    def spans_arrived(self, runs: Sequence[Run], now: float) -> None:
        """Note that spans were stored: runs of (rollout id, attempt id, first row, rows, first number, last
        number) in their batch.
        """
        for rollout_id, _attempt_id, _start, _rows, _sequence, last in runs:
            if last > _GREATEST_SEQUENCE:
                raise StoreError(f"rollout {rollout_id!r} has no span numbers left: {last} is too great")
        for rollout_id, _attempt_id, _start, _rows, _sequence, last in runs:
            if last < self.state.rollouts[rollout_id].sequence:
                self._given[rollout_id] = last
            else:
                self._given.pop(rollout_id, None)
        if runs:
            self._emit("spans", now, runs=runs)

    # --- change and end -------------------------------------------------------------------------------------

    def finish(self, finishes: Sequence[Ending], now: float, runs: Sequence[Run] = ()) -> list[Rollout]:
        """End attempts, with ``runs`` of their spans, all or none; one that has ended stays as it is.

        ``metadata`` may say ``infrastructure: True`` and give a ``reason``.
        """
        for rollout_id, attempt_id, status, _metadata in finishes:
            if status not in TERMINAL_ATTEMPT:
                raise StoreError(
                    f"finish_attempt of {rollout_id} got status {status!r}; it must be one of "
                    f"{sorted(TERMINAL_ATTEMPT)}"
                )
            self._known_attempt(rollout_id, attempt_id)
        told = [plain(dict(end[3] or {}), f"the metadata of attempt {end[1]}") for end in finishes]
        self.spans_arrived(runs, now)
        for (rollout_id, attempt_id, status, _), metadata in zip(finishes, told, strict=True):
            if self._is_live(rollout_id, attempt_id):
                self._end(self.state.live[rollout_id], status, metadata, now)
        return [self.rollout(end[0]) for end in finishes]

    def update_rollout(self, rollout_id: str, changes: Mapping[str, Any], now: float) -> Rollout:
        """Change fields and the status; the status of a rollout that has ended stays."""
        entry = self._entry(rollout_id)
        fields, status = rollout_changes(entry.rollout, changes, self.state.resources)
        if status == entry.rollout.status or entry.rollout.status in TERMINAL_ROLLOUT:
            status = None
        works = status in ("preparing", "running")
        if works and rollout_id not in self.state.live:
            raise StoreError(
                f"rollout {rollout_id!r} cannot be set to {status!r}: it has no attempt at work; begin one with "
                "start_attempt"
            )
        if fields:
            self._emit("updated", now, rollout_id=rollout_id, changes=fields)
            if rollout_id in self.state.live:
                self._watch(rollout_id, now)
        if status is not None:
            if works:
                attempt_id = self.state.live[rollout_id].attempt.attempt_id
                self._update_live(rollout_id, attempt_id, {"status": status}, now)
            else:
                reason = "cancelled" if status == "cancelled" else f"its rollout was set to {status}"
                self._settle(rollout_id, status, reason, now)
        return self.rollout(rollout_id)

    def update_attempt(self, rollout_id: str, attempt_id: str, changes: Mapping[str, Any], now: float) -> Attempt:
        """Change an attempt, or ``"latest"``; a terminal status ends it. One that has ended keeps its status."""
        entry = self._entry(rollout_id)
        latest = attempt_id == "latest" and entry.attempts
        attempt = entry.attempts[-1] if latest else self._known_attempt(rollout_id, attempt_id)
        fields = attempt_changes(f"update_attempt of {rollout_id}, {attempt.attempt_id}", changes)
        status, heartbeat = fields.pop("status", None), fields.pop("last_heartbeat_time", None)
        ends = status in TERMINAL_ATTEMPT
        if self._is_live(rollout_id, attempt.attempt_id):
            if status is not None and not ends and status != attempt.status:
                fields["status"] = status
            if fields:
                self._update_live(rollout_id, attempt.attempt_id, fields, now)
            self._alive(self.state.live[rollout_id], now)
            if ends:
                self._end(self.state.live[rollout_id], str(status), attempt.metadata or {}, now)
        elif "metadata" in fields:
            self._update_live(rollout_id, attempt.attempt_id, {"metadata": fields["metadata"]}, now)
        if heartbeat is not None:
            attempt.last_heartbeat_time = heartbeat
        return attempt.model_copy()

    def delete(self, rollout_ids: Sequence[str], now: float) -> list[str]:
        """Forget rollouts; returns those that were there."""
        found = [rollout_id for rollout_id in dict.fromkeys(rollout_ids) if rollout_id in self.state.rollouts]
        if found:
            self._emit("deleted", now, rollout_ids=found)
        for rollout_id in found:
            self._given.pop(rollout_id, None)
        return found

    # --- workers and time -----------------------------------------------------------------------------------

    def heartbeat(self, worker_id: str, attempts: Iterable[tuple[str, str]], now: float) -> list[tuple[str, str]]:
        """Renew leases; returns the attempts the worker is to stop: ended, cancelled or taken back."""
        self._meet(worker_id, now).last_heartbeat_time = now
        stop = []
        for rollout_id, attempt_id in attempts:
            if self._is_live(rollout_id, attempt_id):
                live = self.state.live[rollout_id]
                if live.attempt.worker_id in (worker_id, None):
                    self._alive(live, now)
                    continue
            stop.append((rollout_id, attempt_id))
        return stop

    def update_worker(self, worker_id: str, stats: Mapping[str, Any] | None, now: float) -> Worker:
        """Note how a worker is, and that all it is at is alive."""
        if stats is not None:
            told = plain(dict(stats), f"the heartbeat_stats of worker {worker_id!r}")
            self._emit("worker", now, worker_id=worker_id, heartbeat_stats=told)
        worker = self._meet(worker_id, now)
        worker.last_heartbeat_time = now
        for rollout_id in self.state.by_worker.get(worker_id, ()):
            self._alive(self.state.live[rollout_id], now)
        return worker.model_copy()

    def release_worker(self, worker_id: str, reason: str, now: float) -> list[str]:
        """Take all live attempts back from a dead worker; returns their rollouts' ids."""
        held, weight = sorted(self.state.by_worker.get(worker_id, ())), self._weight(worker_id)
        for rollout_id in held:
            self._lose(self.state.live[rollout_id], f"worker {worker_id} was lost: {reason}", now, weight=weight)
        return held

    def tick(self, now: float) -> None:
        """End attempts past their timeout or unresponsive, take back those of silent workers, and delete what
        ended long ago.
        """
        weights = {worker_id: self._weight(worker_id) for worker_id in self.state.by_worker}
        self._deadlines.tick(now, lambda rollout_id, attempt_id: self._look(rollout_id, attempt_id, now, weights))
        if self._retention_seconds is not None:
            self._delete_old(now - self._retention_seconds, now)

    # --- resources and answers ------------------------------------------------------------------------------

    def update_resources(self, resources_id: str, resources: NamedResources, now: float) -> ResourcesUpdate:
        """Publish resources under an id, as the latest; the same content again is no new version."""
        before = self.state.resources.get(resources_id)
        told = plain(resources, f"resources {resources_id!r}")
        same = before is not None and before.model_dump()["resources"] == told
        if not same or self.state.latest_resources_id != resources_id:
            version = (before.version if before else 0) + (not same)
            self._emit("resources", now, resources_id=resources_id, version=version, resources=told)
        return self.state.resources[resources_id]

    def rollout(self, rollout_id: str) -> Rollout:
        """A copy of the rollout as it stands. Raises StoreError if it is unknown."""
        return self._entry(rollout_id).rollout.model_copy()

    # --- inside ---------------------------------------------------------------------------------------------

    def _plan(self, request: EnqueueRolloutRequest) -> dict[str, Any]:
        rollout_id = request.rollout_id or self._make_id("ro")
        if request.resources_id is not None and request.resources_id not in self.state.resources:
            raise StoreError(
                f"rollout {rollout_id} names resources {request.resources_id!r}, which the store "
                "does not have; publish them with update_resources first"
            )
        rollout = {
            "rollout_id": rollout_id,
            "input": request.input,
            "mode": request.mode,
            "resources_id": request.resources_id or self.state.latest_resources_id,
            "config": dict(request.config) if request.config else {},
            "metadata": request.metadata,
        }
        return plain(rollout, f"the input or metadata of rollout {rollout_id}")

    def _start(
        self,
        rollout_id: str,
        attempt_id: str,
        worker_id: str | None,
        now: float,
        rollout: dict[str, Any] | None = None,
    ) -> None:
        self._emit(
            "started",
            now,
            rollout=rollout,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            worker_id=worker_id,
            leased=worker_id is not None,
        )
        self._watch(rollout_id, now)

    def _watch(self, rollout_id: str, now: float) -> None:
        """Have the live attempt looked at when it may be late."""
        live = self.state.live[rollout_id]
        self._deadlines.watch(rollout_id, live.attempt.attempt_id, self._deadline(live, now))

    def _deadline(self, live: Live, now: float) -> float | None:
        config = self.state.rollouts[live.attempt.rollout_id].rollout.config
        silence = [config.unresponsive_seconds, self._lease_seconds if live.leased else None]
        seen = min(live.last_seen, now)  # a clock that was set back
        ends = [seen + seconds for seconds in silence if seconds is not None]
        if config.timeout_seconds is not None:
            ends.append(live.attempt.start_time + config.timeout_seconds)
        return min(ends, default=None)

    def _look(self, rollout_id: str, attempt_id: str, now: float, weights: Mapping[str | None, int]) -> float | None:
        """End an attempt that is late; otherwise when it may be."""
        if not self._is_live(rollout_id, attempt_id):
            return None
        live, config = self.state.live[rollout_id], self.state.rollouts[rollout_id].rollout.config
        timeout, unresponsive, silent = config.timeout_seconds, config.unresponsive_seconds, now - live.last_seen
        if timeout is not None and now - live.attempt.start_time > timeout:
            self._end(live, "timeout", {"reason": f"ran longer than {timeout} s"}, now)
        elif unresponsive is not None and silent > unresponsive:
            self._end(live, "unresponsive", {"reason": f"no sign of life for {unresponsive} s"}, now)
        elif live.leased and silent > self._lease_seconds:
            silence = f"worker {live.attempt.worker_id} was silent for {self._lease_seconds} s"
            self._lose(live, silence, now, weight=weights[live.attempt.worker_id])
        else:
            return self._deadline(live, now)
        return None

    def _end(self, live: Live, status: str, metadata: dict[str, Any], now: float) -> None:
        if metadata.get(INFRASTRUCTURE) and status != "succeeded":
            self._lose(live, str(metadata.get("reason", "no reason given")), now, status, metadata)
            return
        entry = self.state.rollouts[live.attempt.rollout_id]
        config = entry.rollout.config
        retry = status in config.retry_condition and entry.counted + 1 < config.max_attempts
        failure = None if status == "succeeded" or retry else {"kind": status, "reason": metadata.get("reason")}
        after = "succeeded" if status == "succeeded" else "requeuing" if retry else "failed"
        self._emit_end(live, status, metadata, now, 0, after, failure)

    def _lose(
        self,
        live: Live,
        reason: str,
        now: float,
        status: str = "failed",
        metadata: dict[str, Any] | None = None,
        weight: int = OWN_LOSS,
    ) -> None:
        entry = self.state.rollouts[live.attempt.rollout_id]
        retry = entry.infrastructure < MAX_INFRASTRUCTURE_FAILURES * OWN_LOSS
        failure = None if retry else {"kind": INFRASTRUCTURE, "reason": reason}
        told = {**(metadata or {}), INFRASTRUCTURE: True, "reason": reason}
        # What was lost alone, or is lost again, may be what kills its workers: the others go first.
        keeps_turn = weight == SHARED_LOSS and not entry.infrastructure
        self._emit_end(live, status, told, now, weight, "requeuing" if retry else "failed", failure, keeps_turn)

    def _weight(self, worker_id: str | None) -> int:
        return SHARED_LOSS if len(self.state.by_worker.get(worker_id, ())) > 1 else OWN_LOSS

    def _emit_end(
        self,
        live: Live,
        status: str,
        metadata: dict[str, Any],
        now: float,
        infrastructure: int,
        rollout_status: str,
        failure: dict[str, Any] | None,
        keeps_turn: bool = False,
    ) -> None:
        self._emit(
            "ended",
            now,
            rollout_id=live.attempt.rollout_id,
            attempt_id=live.attempt.attempt_id,
            status=status,
            metadata=metadata,
            infrastructure=infrastructure,
            rollout_status=rollout_status,
            failure=failure,
            keeps_turn=keeps_turn,
        )

    def _settle(self, rollout_id: str, rollout_status: str, reason: str, now: float) -> None:
        """Set a rollout's status, and end its live attempt without counting it."""
        status = "succeeded" if rollout_status == "succeeded" else "failed"
        facts = {"rollout_id": rollout_id, "status": status, "rollout_status": rollout_status, "reason": reason}
        self._emit("settled", now, **facts)

    def _update_live(self, rollout_id: str, attempt_id: str, changes: dict[str, Any], now: float) -> None:
        self._emit("attempt_updated", now, rollout_id=rollout_id, attempt_id=attempt_id, changes=changes)

    def _alive(self, live: Live, now: float) -> None:
        live.last_seen = live.attempt.last_heartbeat_time = now

    def _meet(self, worker_id: str, now: float) -> Worker:
        """The worker; logged when it is seen for the first time."""
        if worker_id not in self.state.workers:
            self._emit("worker", now, worker_id=worker_id, heartbeat_stats=None)
        return self.state.workers[worker_id]

    def _note_empty_handed(self, worker_id: str | None, now: float) -> None:
        if worker_id is None:
            return
        worker = self._meet(worker_id, now)
        worker.last_dequeue_time = now
        if worker.status == "unknown":
            worker.status, worker.last_idle_time = "idle", now

    def _delete_old(self, before: float, now: float) -> None:
        old: list[str] = []
        while self._ended and self._ended[0][0] < before and len(old) < _DELETED_AT_ONCE:
            end_time, rollout_id = self._ended.popleft()
            entry = self.state.rollouts.get(rollout_id)
            if entry is not None and entry.rollout.end_time == end_time:
                old.append(rollout_id)
        self.delete(old, now)

    def _emit(self, kind: str, now: float, **facts: Any) -> None:
        event = {"kind": kind, "time": now, **facts}
        self.state.apply(event)
        self._events.append(event)
        if self._retention_seconds is not None and facts.get("rollout_status") in TERMINAL_ROLLOUT:
            self._ended.append((now, facts["rollout_id"]))

    def _entry(self, rollout_id: str) -> RolloutEntry:
        entry = self.state.rollouts.get(rollout_id)
        if entry is None:
            raise StoreError(f"the store has no rollout {rollout_id!r}; enqueue it first")
        return entry

    def _known_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        self._entry(rollout_id)
        attempt = self.state.attempt(rollout_id, attempt_id)
        if attempt is None:
            raise StoreError(f"rollout {rollout_id!r} has no attempt {attempt_id!r}; use the ids that dequeue gave")
        return attempt

    def _is_live(self, rollout_id: str, attempt_id: str) -> bool:
        live = self.state.live.get(rollout_id)
        return live is not None and live.attempt.attempt_id == attempt_id

    def _attempted(self, rollout_id: str, attempt_id: str) -> AttemptedRollout:
        return attempted(self._entry(rollout_id), self._known_attempt(rollout_id, attempt_id))
