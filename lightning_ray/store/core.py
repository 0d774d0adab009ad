"""The span store: rollouts, their attempts and their spans, durable in a folder.

``SpanStore`` is the single writer of a folder, synchronous and single-threaded; what its calls return is
durable, and every call may be resent. It replays the log on opening, so a store that was killed stands where
it stood. Waiting, group commits and the pace of the watchdog are the service's matter.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.index import Admitted
from lightning_ray.store.lifecycle import new_id
from lightning_ray.store.log import Event, Fsync, LogWriter
from lightning_ray.store.schema import encode_batch
from lightning_ray.store.view import StoreView
from lightning_ray.types import (
    TERMINAL_ROLLOUT,
    AttemptedRollout,
    Clock,
    EnqueueRolloutRequest,
    NamedResources,
    ResourcesUpdate,
    Rollout,
)

_LOCK_SECONDS = 10.0


class SpanStore(StoreView):
    """The one writer of a folder.

    With ``fsync="group"`` calls return after their record is on disk, with ``"none"`` after the operating
    system has it (safe against kill -9, not against power loss). A log file is followed by the next at about
    ``file_bytes``. Raises StoreError if another process writes the folder, or the log is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        clock: Clock = time.time,
        fsync: Fsync = "group",
        *,
        lease_seconds: float = 60.0,
        file_bytes: int = 256 * 2**20,
    ) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._lock = _lock(Path(folder))
        try:
            super().__init__(folder, lease_seconds=lease_seconds, repair=True)
            self._log = LogWriter(self.folder, fsync, file_bytes)
        except BaseException:
            os.close(self._lock)
            raise
        self.defer_sync = False
        """Whether syncing is left to who calls ``sync_job``."""
        self.observe: Callable[[list[Event]], None] = lambda events: None
        """Called with the events of each record, once it is written."""
        self._clock = clock
        self._lifecycle.reopened(clock())
        self._commit()

    @property
    def records(self) -> int:
        """Records written since opening."""
        return self._log.records

    @property
    def queued(self) -> int:
        """Rollouts that wait for a worker."""
        return len(self._lifecycle.state.queue)

    def enqueue_many_rollouts(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        """Queue rollouts, with the latest resources unless they name others.

        One whose ``rollout_id`` is known is answered as it stands. Raises StoreError for unknown resources.
        """
        rollouts = self._lifecycle.enqueue(requests, self._clock())
        self._commit()
        return rollouts

    def dequeue_many_rollouts(
        self, limit: int, worker_id: str, request_id: str | None = None
    ) -> list[AttemptedRollout]:
        """Lease up to ``limit`` queued rollouts to a worker, oldest first, each with a new attempt.

        The same ``request_id`` again is given the same claims, as far as they still are at work.
        """
        claims = self._lifecycle.dequeue(limit, worker_id, request_id, self._clock())
        self._commit()
        return claims

    def add_many_spans(self, batch: pa.RecordBatch, encoded: pa.Buffer | None = None) -> None:
        """Store spans, each once by (rollout, attempt, span id).

        ``encoded`` is the batch as ``encode_batch`` gave it, if at hand. Raises StoreError naming attempts
        the store does not know, after the other rows were stored.
        """
        admitted = self._index.admit(batch, lambda *ids: self._lifecycle.state.attempt(*ids) is not None)
        self._commit(admitted, _encoded(batch, admitted, encoded))
        if admitted.unknown:
            raise StoreError(
                f"spans of unknown attempts were refused: {admitted.unknown[:5]}; use the ids dequeue gave"
            )

    def finish_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: str,
        spans: pa.RecordBatch | None = None,
        metadata: dict[str, Any] | None = None,
        encoded: pa.Buffer | None = None,
    ) -> Rollout:
        """End an attempt and store its last spans, both or neither. Returns the rollout as it then stands.

        An attempt that has ended stays as it is; its spans are stored all the same. ``metadata`` with
        ``infrastructure: True`` (and a ``reason``) marks a failure that is not the agent's: it is not
        counted. Raises StoreError for an unknown attempt, a status that ends nothing, or spans of another
        attempt.
        """
        admitted = body = None
        if spans is not None and spans.num_rows:
            admitted = self._index.admit(spans, lambda *ids: ids == (rollout_id, attempt_id))
            if admitted.unknown:
                raise StoreError(
                    f"finish_attempt of {rollout_id} came with spans of {admitted.unknown[:5]}; "
                    "send those with add_many_spans"
                )
            body = _encoded(spans, admitted, encoded)
        rollout = self._lifecycle.finish(rollout_id, attempt_id, status, metadata, self._clock())
        self._commit(admitted, body)
        return rollout

    def update_rollout(self, rollout_id: str, status: str) -> Rollout:
        """Cancel a rollout (``"cancelled"``); one that has ended stays as it is, see the answer's status."""
        rollout = self._lifecycle.update(rollout_id, status, self._clock())
        self._commit()
        return rollout

    def heartbeat(self, worker_id: str, attempts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Renew the leases of the (rollout, attempt) ids a worker is at; returns those it is to stop."""
        return self._lifecycle.heartbeat(worker_id, attempts, self._clock())

    def release_worker(self, worker_id: str, reason: str) -> list[str]:
        """Take back what a dead worker was at, not counted as the agent's failure; returns the rollouts' ids.

        A worker that is started again takes a new id.
        """
        rollout_ids = self._lifecycle.release_worker(worker_id, reason, self._clock())
        self._commit()
        return rollout_ids

    def tick(self) -> None:
        """Look after timeouts, unresponsive agents and silent workers; to be called about once a second."""
        self._lifecycle.tick(self._clock())
        self._commit()

    def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under a new id."""
        return self.update_resources(new_id("rs"), resources)

    def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under an id, as the latest; the same content again is no new version."""
        update = self._lifecycle.update_resources(resources_id, resources, self._clock())
        self._commit()
        return update

    def sync_job(self) -> Callable[[], None] | None:
        """What makes all calls so far durable, to be called once, in any thread; None if they are."""
        return self._log.sync_job()

    def close(self) -> None:
        """Make all durable and let go of the folder."""
        self._log.close()
        os.close(self._lock)

    def _commit(self, admitted: Admitted | None = None, body: pa.Buffer | None = None) -> None:
        if admitted is not None and body is not None:
            self._lifecycle.spans_arrived(admitted.runs, self._clock())
        events = self._lifecycle.take_events()
        if events:
            ref = self._log.append(events, body)
            if admitted is not None and ref is not None:
                self._index.add(ref, admitted.runs)
                self._index.remember(admitted.ids)
            if not self.defer_sync:
                self._log.sync()
            self.observe(events)
        touched = [event["rollout_id"] for event in events if "rollout_status" in event]
        for rollout_id in [*touched, *(admitted.ids if admitted else ())]:
            if self._lifecycle.state.rollouts[rollout_id].rollout.status in TERMINAL_ROLLOUT:
                self._index.forget(rollout_id)


def _encoded(batch: pa.RecordBatch, admitted: Admitted, encoded: pa.Buffer | None) -> pa.Buffer | None:
    if not admitted.runs:
        return None
    if admitted.batch is batch and encoded is not None:
        return encoded
    return encode_batch(admitted.batch)


def _lock(folder: Path) -> int:
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise StoreError(
                    f"another process writes the store in {folder}; end that run, or use another folder"
                ) from None
            time.sleep(0.05)
