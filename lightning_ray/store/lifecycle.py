"""The rollout state machine: what each call decides, given the state and the time.

    queuing -> preparing (leased) -> running (first span) -> succeeded | failed | cancelled
                    ^ requeuing <- failed, timeout, unresponsive, if RolloutConfig retries them;
                                   and infrastructure failures, which do not count, up to 5 times

Terminal states of rollouts and attempts are final: what comes later changes nothing. Every call may be
resent. Pure: it neither reads a clock nor writes; each decision is an event, applied at once and handed out
by ``take_events`` to be logged.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from lightning_ray.errors import StoreError
from lightning_ray.store.log import Event
from lightning_ray.store.packing import pack, unpack
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
)

MAX_INFRASTRUCTURE_FAILURES = 5
"""How often a rollout is queued again because a worker, not the agent, failed."""

INFRASTRUCTURE = "infrastructure"
"""Key of an attempt's metadata that is true when the infrastructure failed, not the agent."""


def new_id(prefix: str) -> str:
    """A fresh id such as ``ro-`` and 16 hex digits."""
    return f"{prefix}-{secrets.token_hex(8)}"


class Lifecycle:
    """Decides on rollouts. ``now`` is Unix seconds.

    ``lease_seconds`` is how long a worker may be silent about an attempt: no span of it, no heartbeat.
    """

    def __init__(self, lease_seconds: float = 60.0, make_id: Callable[[str], str] = new_id) -> None:
        self.state = RunState()
        self._lease_seconds = lease_seconds
        self._make_id = make_id
        self._events: list[Event] = []

    def take_events(self) -> list[Event]:
        """The events since the last call, in order; they are to be logged as one record."""
        events, self._events = self._events, []
        return events

    def reopened(self, now: float) -> None:
        """Give live attempts found in a log a fresh lease."""
        if self.state.live:
            self._emit("reopened", now)

    def enqueue(self, requests: Sequence[EnqueueRolloutRequest], now: float) -> list[Rollout]:
        """Queue rollouts; one whose id is known is answered as it is. StoreError for unknown resources."""
        for request in requests:
            if request.resources_id is not None and request.resources_id not in self.state.resources:
                raise StoreError(
                    f"rollout {request.rollout_id} names resources {request.resources_id!r}, which the store "
                    "does not have; publish them with update_resources first"
                )
        planned = [self._plan(request) for request in requests]
        for rollout in planned:
            if rollout["rollout_id"] not in self.state.rollouts:
                self._emit("enqueued", now, rollout=rollout)
        return [self.rollout(rollout["rollout_id"]) for rollout in planned]

    def dequeue(self, limit: int, worker_id: str, request_id: str | None, now: float) -> list[AttemptedRollout]:
        """Lease up to ``limit`` queued rollouts, oldest first.

        A repeated ``request_id`` gets its claims again, as far as they are still at work.
        """
        if request_id is not None and request_id in self.state.requests:
            claims = self.state.requests[request_id]
            return [
                self._attempted(rollout_id)
                for rollout_id, attempt_id in claims
                if self._is_live(rollout_id, attempt_id)
            ]
        claimed = list(islice(self.state.queue, max(limit, 0)))
        if not claimed:
            return []
        claims = [(rollout_id, self._make_id("at")) for rollout_id in claimed]
        self._emit("leased", now, worker_id=worker_id, request_id=request_id, claims=claims)
        return [self._attempted(rollout_id) for rollout_id in claimed]

    def spans_arrived(self, runs: list[tuple[str, str, int, int]], now: float) -> None:
        """Note that spans were stored: runs of (rollout id, attempt id, first row, rows) in their batch."""
        self._emit("spans", now, runs=runs)

    def finish(
        self, rollout_id: str, attempt_id: str, status: str, metadata: dict[str, Any] | None, now: float
    ) -> Rollout:
        """End an attempt; one that has ended stays as it is.

        ``metadata`` may say ``infrastructure: True`` and give a ``reason``.
        """
        if status not in TERMINAL_ATTEMPT:
            raise StoreError(
                f"finish_attempt of {rollout_id} got status {status!r}; it must be one of {sorted(TERMINAL_ATTEMPT)}"
            )
        self._check_attempt(rollout_id, attempt_id)
        if self._is_live(rollout_id, attempt_id):
            self._end(self.state.live[rollout_id], status, metadata or {}, now)
        return self.rollout(rollout_id)

    def update(self, rollout_id: str, status: str, now: float) -> Rollout:
        """Cancel a rollout; a terminal one stays as it is."""
        if status != "cancelled":
            raise StoreError(f"update_rollout of {rollout_id} got status {status!r}; only 'cancelled' can be set")
        if self._entry(rollout_id).rollout.status not in TERMINAL_ROLLOUT:
            self._emit("cancelled", now, rollout_id=rollout_id, rollout_status="cancelled")
        return self.rollout(rollout_id)

    def heartbeat(self, worker_id: str, attempts: Iterable[tuple[str, str]], now: float) -> list[tuple[str, str]]:
        """Renew leases; returns the attempts the worker is to stop: ended, cancelled or taken back."""
        stop = []
        for rollout_id, attempt_id in attempts:
            live = self.state.live.get(rollout_id)
            if live is None or live.attempt.attempt_id != attempt_id or live.attempt.worker_id != worker_id:
                stop.append((rollout_id, attempt_id))
            else:
                live.last_seen = live.attempt.last_heartbeat_time = now
        return stop

    def release_worker(self, worker_id: str, reason: str, now: float) -> list[str]:
        """Take all live attempts back from a dead worker; returns their rollouts' ids."""
        held = sorted(self.state.by_worker.get(worker_id, ()))
        for rollout_id in held:
            self._lose(self.state.live[rollout_id], f"worker {worker_id} was lost: {reason}", now)
        return held

    def tick(self, now: float) -> None:
        """End attempts past their timeout or unresponsive, and take back those of silent workers."""
        for rollout_id, live in list(self.state.live.items()):
            config = self.state.rollouts[rollout_id].rollout.config
            timeout, unresponsive = config.timeout_seconds, config.unresponsive_seconds
            if timeout is not None and now - live.attempt.start_time > timeout:
                self._end(live, "timeout", {"reason": f"ran longer than {timeout} s"}, now)
            elif unresponsive is not None and now - live.last_span > unresponsive:
                self._end(live, "unresponsive", {"reason": f"no span for {unresponsive} s"}, now)
            elif now - live.last_seen > self._lease_seconds:
                silence = f"worker {live.attempt.worker_id} was silent for {self._lease_seconds} s"
                self._lose(live, silence, now)

    def update_resources(self, resources_id: str, resources: NamedResources, now: float) -> ResourcesUpdate:
        """Publish resources under an id, as the latest; the same content again is no new version."""
        before = self.state.resources.get(resources_id)
        plain = unpack(pack(resources, f"resources {resources_id!r}"))
        same = before is not None and before.model_dump()["resources"] == plain
        if not same or self.state.latest_resources_id != resources_id:
            version = (before.version if before else 0) + (not same)
            self._emit("resources", now, resources_id=resources_id, version=version, resources=plain)
        return self.state.resources[resources_id]

    def rollout(self, rollout_id: str) -> Rollout:
        """A copy of the rollout as it stands. Raises StoreError if it is unknown."""
        return self._entry(rollout_id).rollout.model_copy()

    def attempts(self, rollout_id: str) -> list[Attempt]:
        """Copies of the rollout's attempts, in order. Raises StoreError if it is unknown."""
        return [attempt.model_copy() for attempt in self._entry(rollout_id).attempts]

    def _plan(self, request: EnqueueRolloutRequest) -> dict[str, Any]:
        rollout_id = request.rollout_id or self._make_id("ro")
        rollout = request.model_dump(include={"mode", "metadata"}) | {
            "rollout_id": rollout_id,
            "input": request.input,
            "resources_id": request.resources_id or self.state.latest_resources_id,
            "config": request.config.model_dump() if request.config else {},
        }
        return unpack(pack(rollout, f"the input or metadata of rollout {rollout_id}"))

    def _end(self, live: Live, status: str, metadata: dict[str, Any], now: float) -> None:
        if metadata.get(INFRASTRUCTURE) and status != "succeeded":
            self._lose(live, str(metadata.get("reason", "no reason given")), now, status, metadata)
            return
        entry = self.state.rollouts[live.attempt.rollout_id]
        config = entry.rollout.config
        retry = status in config.retry_condition and entry.counted + 1 < config.max_attempts
        failure = None if status == "succeeded" or retry else {"kind": status, "reason": metadata.get("reason")}
        after = "succeeded" if status == "succeeded" else "requeuing" if retry else "failed"
        self._emit_end(live, status, metadata, now, False, after, failure)

    def _lose(
        self,
        live: Live,
        reason: str,
        now: float,
        status: str = "failed",
        metadata: dict[str, Any] | None = None,
    ) -> None:
        entry = self.state.rollouts[live.attempt.rollout_id]
        retry = entry.infrastructure < MAX_INFRASTRUCTURE_FAILURES
        failure = None if retry else {"kind": INFRASTRUCTURE, "reason": reason}
        told = {**(metadata or {}), INFRASTRUCTURE: True, "reason": reason}
        self._emit_end(live, status, told, now, True, "requeuing" if retry else "failed", failure)

    def _emit_end(
        self,
        live: Live,
        status: str,
        metadata: dict[str, Any],
        now: float,
        infrastructure: bool,
        rollout_status: str,
        failure: dict[str, Any] | None,
    ) -> None:
        attempt = live.attempt
        self._emit(
            "ended",
            now,
            rollout_id=attempt.rollout_id,
            attempt_id=attempt.attempt_id,
            status=status,
            metadata=unpack(pack(metadata, f"the metadata of attempt {attempt.attempt_id}")),
            infrastructure=infrastructure,
            rollout_status=rollout_status,
            failure=failure,
        )

    def _emit(self, kind: str, now: float, **facts: Any) -> None:
        event = {"kind": kind, "time": now, **facts}
        self.state.apply(event)
        self._events.append(event)

    def _entry(self, rollout_id: str) -> RolloutEntry:
        entry = self.state.rollouts.get(rollout_id)
        if entry is None:
            raise StoreError(f"the store has no rollout {rollout_id!r}; enqueue it first")
        return entry

    def _check_attempt(self, rollout_id: str, attempt_id: str) -> None:
        self._entry(rollout_id)
        if self.state.attempt(rollout_id, attempt_id) is None:
            raise StoreError(f"rollout {rollout_id!r} has no attempt {attempt_id!r}; use the ids that dequeue gave")

    def _is_live(self, rollout_id: str, attempt_id: str) -> bool:
        live = self.state.live.get(rollout_id)
        return live is not None and live.attempt.attempt_id == attempt_id

    def _attempted(self, rollout_id: str) -> AttemptedRollout:
        live = self.state.live[rollout_id]
        return AttemptedRollout.model_construct(
            **dict(self.state.rollouts[rollout_id].rollout), attempt=live.attempt.model_copy()
        )
