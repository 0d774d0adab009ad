"""The span store: rollouts, their attempts and their spans, durable in a folder.

``SpanStore`` is the single writer of a folder, synchronous and single-threaded; what its calls return is
durable, and every call may be resent. Each call is decided (lifecycle), then written (storage), then
answered. Waiting, group commits and the pace of the watchdog are the service's matter.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.index import Admitted
from lightning_ray.store.lifecycle import Ending, Lifecycle
from lightning_ray.store.log import Event, Fsync
from lightning_ray.store.reading import StoreReader
from lightning_ray.store.schema import encode_batch
from lightning_ray.store.state import RunState
from lightning_ray.store.storage import FILE_BYTES, Compaction, Storage
from lightning_ray.types import (
    TERMINAL_ROLLOUT,
    Attempt,
    AttemptedRollout,
    Clock,
    EnqueueRolloutRequest,
    NamedResources,
    ResourcesUpdate,
    Rollout,
    Worker,
)

_LOCK_SECONDS = 10.0


class SpanStore(StoreReader):
    """The one writer of a folder. What the calls do is told in ``lightning_ray.store.base``.

    With ``fsync="group"`` calls return after their record is on disk, with ``"none"`` after the operating
    system has it (safe against kill -9, not against power loss). ``lease_seconds`` is how long a worker may
    be silent, ``retention_seconds`` how long a rollout is kept after its end (None: for ever). A log file is
    followed by the next at about ``file_bytes``, and made into segments as ``compaction`` tells. Raises
    StoreError if another process writes the folder, or its files are damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        clock: Clock = time.time,
        fsync: Fsync = "group",
        *,
        lease_seconds: float = 60.0,
        retention_seconds: float | None = None,
        file_bytes: int = FILE_BYTES,
        compaction: Compaction | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        try:
            state = RunState()
            self.storage = Storage(self.folder, state, fsync=fsync, file_bytes=file_bytes, settings=compaction)
        except BaseException:
            os.close(self._lock)
            raise
        super().__init__(state, self.storage.index)
        self.notes = self.storage.notes
        self.defer_sync = False
        """Whether syncing is left to who calls ``sync_job``."""
        self.observe: Callable[[list[Event]], None] = lambda events: None
        """Called with the events of each record, once it is written."""
        self._clock = clock
        self._opened = time.monotonic()
        self._lifecycle = Lifecycle(lease_seconds, retention_seconds=retention_seconds, state=state)
        self._lifecycle.reopened(clock())
        self._commit()

    @property
    def records(self) -> int:
        """Records written since opening."""
        return self.storage.records

    @property
    def queued(self) -> int:
        """Rollouts that wait for a worker."""
        return len(self.state.queue)

    def enqueue_many_rollouts(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        """Queue rollouts, with the latest resources unless they name others."""
        rollouts = self._lifecycle.enqueue(requests, self._clock())
        self._commit()
        return rollouts

    def start_rollout(
        self, request: EnqueueRolloutRequest, attempt_id: str, worker_id: str | None = None
    ) -> AttemptedRollout:
        """Create a rollout and begin its first attempt."""
        started = self._lifecycle.start(request, attempt_id, worker_id, self._clock())
        self._commit()
        return started

    def start_attempt(self, rollout_id: str, attempt_id: str, worker_id: str | None = None) -> AttemptedRollout:
        """Begin a further attempt of a rollout."""
        started = self._lifecycle.start_attempt(rollout_id, attempt_id, worker_id, self._clock())
        self._commit()
        return started

    def dequeue_many_rollouts(
        self, limit: int, worker_id: str | None = None, request_id: str | None = None
    ) -> list[AttemptedRollout]:
        """Lease up to ``limit`` queued rollouts, oldest first, each with a new attempt."""
        claims = self._lifecycle.dequeue(limit, worker_id, request_id, self._clock())
        self._commit()
        return claims

    def append_spans(self, batch: pa.RecordBatch, encoded: pa.Buffer | None = None) -> list[int]:
        """Store spans; returns the rows that were there.

        ``encoded`` is the batch as ``encode_batch`` gave it, if at hand.
        """
        admitted = self.index.admit(batch, self._is_known, self._lifecycle.last_sequence)
        self._lifecycle.spans_arrived(admitted.runs, self._clock())
        self._commit(admitted, _encoded(batch, admitted, encoded))
        if admitted.unknown:
            raise StoreError(
                f"spans of unknown rollouts or attempts were refused: {admitted.unknown[:5]}; use the ids dequeue gave"
            )
        return admitted.left_out

    def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> list[int]:
        """The next span number for each (rollout, attempt) id."""
        numbers = self._lifecycle.next_sequences(rollout_attempt_ids, self._clock())
        self._commit()
        return numbers

    def finish_many_attempts(
        self, finishes: Sequence[Ending], spans: pa.RecordBatch | None = None, encoded: pa.Buffer | None = None
    ) -> list[Rollout]:
        """End attempts and store their last spans, all or nothing. Returns their rollouts as they then stand."""
        admitted = body = None
        if spans is not None and spans.num_rows:
            ending = {(rollout_id, attempt_id) for rollout_id, attempt_id, _status, _metadata in finishes}
            admitted = self.index.admit(
                spans, lambda *ids: ids in ending and self._is_known(*ids), self._lifecycle.last_sequence
            )
            if admitted.unknown:
                raise StoreError(
                    f"attempts were to be finished with spans of others, {admitted.unknown[:5]}; send those with "
                    "append_spans"
                )
            body = _encoded(spans, admitted, encoded)
        rollouts = self._lifecycle.finish(finishes, self._clock(), admitted.runs if admitted is not None else ())
        self._commit(admitted, body)
        return rollouts

    def update_rollout(self, rollout_id: str, changes: Mapping[str, Any]) -> Rollout:
        """Change a rollout's fields (``input``, ``mode``, ``resources_id``, ``status``, ``config``,
        ``metadata``).
        """
        rollout = self._lifecycle.update_rollout(rollout_id, changes, self._clock())
        self._commit()
        return rollout

    def update_attempt(self, rollout_id: str, attempt_id: str, changes: Mapping[str, Any]) -> Attempt:
        """Change an attempt's fields (``status``, ``worker_id``, ``last_heartbeat_time``, ``metadata``)."""
        attempt = self._lifecycle.update_attempt(rollout_id, attempt_id, changes, self._clock())
        self._commit()
        return attempt

    def update_worker(self, worker_id: str, heartbeat_stats: Mapping[str, Any] | None = None) -> Worker:
        """Note a sign of life of a worker, and how it is."""
        worker = self._lifecycle.update_worker(worker_id, heartbeat_stats, self._clock())
        self._commit()
        return worker

    def heartbeat(self, worker_id: str, attempts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Renew the leases of the (rollout, attempt) ids a worker is at; returns those it is to stop."""
        stop = self._lifecycle.heartbeat(worker_id, attempts, self._clock())
        self._commit()
        return stop

    def release_worker(self, worker_id: str, reason: str) -> list[str]:
        """Take back what a dead worker was at, not counted as the agent's failure; returns the rollouts' ids."""
        rollout_ids = self._lifecycle.release_worker(worker_id, reason, self._clock())
        self._commit()
        return rollout_ids

    def delete_rollouts(self, rollout_ids: Sequence[str]) -> list[str]:
        """Remove rollouts with all their attempts and spans; returns the ids that were there."""
        deleted = self._lifecycle.delete(rollout_ids, self._clock())
        self._commit()
        return deleted

    def tick(self) -> None:
        """Look after timeouts, unresponsive agents, silent workers and retention; for about once a second."""
        self._lifecycle.tick(self._clock())
        self._commit()

    def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under an id, as the latest; the same content again is no new version."""
        update = self._lifecycle.update_resources(resources_id, resources, self._clock())
        self._commit()
        return update

    def statistics(self) -> dict[str, Any]:
        """As of any reader, and the seconds since opening and the folder's size."""
        return {
            "name": type(self).__name__,
            **super().statistics(),
            "uptime": time.monotonic() - self._opened,
            "disk_bytes": self.storage.disk_bytes,
        }

    def sync_job(self) -> Callable[[], None] | None:
        """What makes all calls so far durable, to be called once, in any thread; None if they are."""
        return self.storage.sync_job()

    def maintain(self) -> None:
        """Have the storage look after itself, in the background; for about once a second."""
        self.storage.maintain()

    def close(self) -> None:
        """Make all durable and let go of the folder."""
        self.storage.close()
        os.close(self._lock)

    def _is_known(self, rollout_id: str, attempt_id: str) -> bool:
        return self.state.attempt(rollout_id, attempt_id) is not None

    def _commit(self, admitted: Admitted | None = None, body: pa.Buffer | None = None) -> None:
        events = self._lifecycle.take_events()
        if events:
            self.storage.append(events, body, admitted.runs if admitted is not None else [])
            if admitted is not None:
                self.index.remember(admitted.ids)
            if not self.defer_sync:
                self.storage.sync()
            self.observe(events)
        touched = [event["rollout_id"] for event in events if "rollout_status" in event]
        for rollout_id in [*touched, *(admitted.ids if admitted is not None else ())]:
            entry = self.state.rollouts.get(rollout_id)
            if entry is None or entry.rollout.status in TERMINAL_ROLLOUT:
                self.index.forget(rollout_id)


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
