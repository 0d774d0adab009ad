"""The writer's disk: what was logged and compacted is loaded on opening; what happens is logged and indexed, and
compacted in the background.

    store/lock                            held by the one writer
    store/log/00000007.log ...            what happened last, in order (log.py)
    store/segments/*.parquet, *.rollouts  spans and rollouts in their long-term form (segments.py)
    store/segments/00000006.state         all else as it stood behind log file 6 (snapshot.py)
    store/manifest.json                   which of these belong to the store (manifest.py)

What was appended survives the death of any process. With ``fsync="group"`` it survives the machine too, once a
sync job begun later is done; with ``"none"`` as far as the operating system had written it. Compaction always
syncs what it writes before it removes what that replaces. All methods are to be called in one thread, but for
jobs, which may run in any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import mkdtemp

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store import compaction
from lightning_ray.store.compaction import Child, Task
from lightning_ray.store.index import SpanIndex
from lightning_ray.store.loading import load, missing, settle
from lightning_ray.store.log import BodyRef, Event, Fsync, LogWriter, log_numbers, log_path
from lightning_ray.store.manifest import Manifest, check_whole, clean, read_manifest, segments_folder
from lightning_ray.store.numbering import Run
from lightning_ray.store.segments import Segment
from lightning_ray.store.state import RunState
from lightning_ray.types import TERMINAL_ROLLOUT

FILE_BYTES = 64 * 2**20
_MANY_LOGS = 8
"""Of more closed log files the older half is compacted, rested or not; of twice as many, without stepping back behind
other work: the disk is finite.
"""


@dataclass(frozen=True, slots=True)
class Compaction:
    """How the log becomes segments.

    A log file rests for ``rest_seconds`` after its last record: what ends meanwhile is read from it as it lies there,
    which takes a tenth of what a segment does. ``segment_bytes`` is about how much of the log one segment takes in at
    most; one of less than an eighth of it is merged with what follows. Segments with deleted rollouts are rewritten
    ``rewrite_seconds`` after the last deletion. A compaction that fails is tried again after ``retry_seconds``. Closing
    compacts what is left, but for what takes longer than ``close_seconds``.
    """

    background: bool = True
    on_close: bool = True
    rest_seconds: float = 60.0
    segment_bytes: int = 4 * FILE_BYTES
    rewrite_seconds: float = 10.0
    retry_seconds: float = 30.0
    job_seconds: float = 600.0
    close_seconds: float = 5.0
    in_process_bytes: int = 4 * 2**20
    """What is no more than this is compacted on closing without a child process."""


class Storage:
    """The files of a store, for its one writer, who holds the lock."""

    def __init__(
        self,
        folder: Path,
        state: RunState,
        *,
        fsync: Fsync = "group",
        file_bytes: int = FILE_BYTES,
        settings: Compaction | None = None,
    ) -> None:
        self.notes: list[str] = []
        """What opening had to drop and what compaction failed at, in words."""
        self.index = SpanIndex(folder)
        self._folder, self._state = folder, state
        self._settings = settings or Compaction()
        manifest = read_manifest(folder)
        check_whole(folder, manifest, log_numbers(folder))
        try:
            load(folder, manifest, state, self.index, self.notes, repair=True)
        except FileNotFoundError as error:
            raise missing(folder, error) from error
        clean(folder, manifest)
        self._manifest = manifest
        self._log = LogWriter(folder, fsync, file_bytes, manifest.covered + 1)
        self._job: _Job | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._removing: Future[None] | None = None
        """The removal of what was replaced last; those before it are done first."""
        self._not_before = 0.0
        self._deleted_at = 0.0
        self._forced = False

    @property
    def records(self) -> int:
        """Records appended since opening."""
        return self._log.records

    @property
    def disk_bytes(self) -> int:
        """Bytes of the log and the segments."""
        numbers = [number for number in log_numbers(self._folder) if number > self._manifest.covered]
        return sum(segment.disk_bytes for segment in self.index.segments) + self._log_bytes(numbers)

    def append(self, events: list[Event], body: pa.Buffer | None = None, runs: Sequence[Run] = ()) -> BodyRef | None:
        """Write one record of events that the state has taken in, with its spans, and index it.

        Raises InfrastructureError if the disk refuses, then and ever after.
        """
        ref = self._log.append(events, body)
        for event in events:
            if event["kind"] == "deleted":
                self._deleted_at = time.monotonic()
                for rollout_id in event["rollout_ids"]:
                    self.index.drop(rollout_id, self._log.number)
            elif event.get("rollout_status") in TERMINAL_ROLLOUT:
                settle(self._state, event["rollout_id"])
        if ref is not None:
            self.index.add(ref, runs)
        return ref

    def sync_job(self) -> Callable[[], None] | None:
        """What makes all calls so far durable, to be called once, in any thread; None if they are."""
        return self._log.sync_job()

    def sync(self) -> None:
        """Make all calls so far durable."""
        self._log.sync()

    def maintain(self) -> None:
        """Begin or go on compacting if there is reason to; to be called about once a second. Does not block."""
        if self._job is not None and self._job.done.done():
            self._take_over(self._job)
        if self._job is not None or not self._settings.background or time.monotonic() < self._not_before:
            return
        task = self._next_task()
        if task is not None:
            self._begin(task, in_process=False)

    def compact(self, seconds: float | None = None) -> None:
        """Compact all there is, at most for so many seconds; what was deleted is then off the disk.

        Raises StoreError if it fails or takes longer.
        """
        seconds = self._settings.job_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        self.begin_compaction()
        while (future := self.compacting()) is not None:
            try:
                future.exception(timeout=max(deadline - time.monotonic(), 0.0))
            except TimeoutError:
                self._forced = False
                raise StoreError(f"the compaction is not done after {seconds:.0f} s; the log stays") from None
            self.go_on()

    def begin_compaction(self) -> None:
        """Close the current log file, so that ``compacting`` and ``go_on`` bring all there is into segments."""
        if self._log.has_records:
            self._log.rotate()
        self._forced = True

    def compacting(self) -> Future[None] | None:
        """A future that is done when ``go_on`` is to be called; None if nothing is left to compact or to remove."""
        if self._job is None:
            task = self._next_task()
            if task is None:
                self._forced = False
                return self._removing
            self._begin(task, in_process=self._is_small(task))
        assert self._job is not None
        return self._job.done

    def go_on(self) -> None:
        """Take over what a compaction has made. Raises StoreError if it failed."""
        if self._job is not None and self._job.done.done():
            error = self._take_over(self._job)
            if error is not None:
                self._forced = False
                raise error
        if self._removing is not None and self._removing.done():
            removing, self._removing = self._removing, None
            if (failure := removing.exception()) is not None:
                raise StoreError(f"files that a compaction replaced are still there: {failure!r}") from failure

    def close(self) -> None:
        """Compact what is left, within bounds, make all durable and let go of the files."""
        try:
            self._log.sync()
            if self._settings.on_close:
                self.compact(self._settings.close_seconds)
        except Exception as error:
            self._note(f"not compacted on closing: {error}")
        finally:
            self.abandon()
            self._log.close()
            if not self._log.has_records and self._manifest.covered == self._log.number - 1:
                self._log.remove()

    def abandon(self) -> None:
        """Give up a compaction at work, unless it is just done."""
        if self._job is not None:
            self._job.stop()
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None
        if self._job is not None and self._job.made is not None:
            self._take_over(self._job)
        self._job = None

    def _next_task(self) -> Task | None:
        closed = [number for number in log_numbers(self._folder) if number < self._log.number]
        waiting = [number for number in closed if number > self._manifest.covered]
        logs = waiting if self._forced else self._rested(waiting)
        segments = self.index.segments
        if logs:
            taken = self._bounded(logs)
            last = segments[-1] if segments else None
            small = last is not None and last.raw_bytes < self._settings.segment_bytes // 8
            task = self._task([last] if small and last is not None else [], taken)
            return replace(task, niceness=0) if len(waiting) > 2 * _MANY_LOGS else task
        quiet = time.monotonic() - self._deleted_at >= self._settings.rewrite_seconds
        if quiet or self._forced:
            for segment in segments:
                if segment.dropped:
                    return self._task([segment], [])
        return None

    def _rested(self, logs: list[int]) -> list[int]:
        if len(logs) > _MANY_LOGS:
            return logs[: -_MANY_LOGS // 2]
        before = time.time() - self._settings.rest_seconds
        return list(takewhile(lambda number: log_path(self._folder, number).stat().st_mtime <= before, logs))

    def _bounded(self, logs: list[int]) -> list[int]:
        size = 0
        taken: list[int] = []
        for number in logs:
            size += log_path(self._folder, number).stat().st_size
            if taken and size > self._settings.segment_bytes:
                break
            taken.append(number)
        return taken

    def _task(self, old: list[Segment], logs: list[int]) -> Task:
        segments_folder(self._folder).mkdir(exist_ok=True)
        return Task(
            folder=str(self._folder),
            out="",
            stem=compaction.stem_of(self._manifest, tuple(segment.stem for segment in old), logs),
            segments=[(segment.stem, sorted(segment.dropped)) for segment in old],
            logs=logs,
            snapshot=self._manifest.snapshot,
        )

    def _is_small(self, task: Task) -> bool:
        old = sum(segment.raw_bytes for segment in self.index.segments if segment.stem in task.old)
        return self._log_bytes(task.logs) + old <= self._settings.in_process_bytes

    def _log_bytes(self, numbers: Sequence[int]) -> int:
        return sum(log_path(self._folder, number).stat().st_size for number in numbers)

    def _begin(self, task: Task, in_process: bool) -> None:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="compaction")
        self._job = _Job(task, self._manifest, self._settings.job_seconds, in_process)
        self._job.done = self._worker.submit(self._job.run)

    def _take_over(self, job: _Job) -> BaseException | None:
        self._job = None
        error = job.done.exception()
        if error is not None:
            self._not_before = time.monotonic() + self._settings.retry_seconds
            self._note(f"a compaction failed and is tried again later: {error}")
            return error
        assert job.made is not None
        before = self._manifest
        self._manifest, segment = job.made
        self.index.put_segment(segment, job.task.old, self._manifest.covered)
        remove = partial(compaction.remove_replaced, job.task, before)
        if self._worker is None:
            remove()
        else:
            self._removing = self._worker.submit(remove)
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class _Job:
    """One compaction, run in a thread of its own."""

    def __init__(self, task: Task, manifest: Manifest, seconds: float, in_process: bool) -> None:
        self.task, self._manifest, self._seconds, self._in_process = task, manifest, seconds, in_process
        self.done: Future[None] = Future()
        self.made: tuple[Manifest, Segment] | None = None
        self._child: Child | None = None
        self._stopped = False

    def run(self) -> None:
        """Make the segment and commit it."""
        out = mkdtemp(prefix="new-", dir=segments_folder(Path(self.task.folder)))
        task = replace(self.task, out=out)
        try:
            if self._in_process:
                compaction.compact(task)
            else:
                self._child = Child(task)
                if self._stopped:
                    self._child.kill()
                self._child.wait(self._seconds)
            self.made = compaction.commit(task, self._manifest)
            self.made[1].let_go_of_content()
        finally:
            compaction.discard(task)

    def stop(self) -> None:
        """End it soon."""
        self._stopped = True
        if self._child is not None:
            self._child.kill()
