"""Compaction: log files and small or partly deleted segments become one segment.

    log files + segments + snapshot --(compact, in a child process)--> files in a folder of their own
        --(commit: rename, manifest)--> part of the store

The child writes only where its task says, and the store is the old one until the manifest names the new files;
so either process may die at any moment. ``python -m lightning_ray.store.compaction TASK`` is the child; it ends
when its standard input does, that is, with its parent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.log import BodyReader, Event, read_log
from lightning_ray.store.manifest import Manifest, segments_folder, write_manifest
from lightning_ray.store.numbering import numbered
from lightning_ray.store.schema import decode_batch
from lightning_ray.store.sealed import read_sealed, sync_folder, write_sealed
from lightning_ray.store.segment_writer import write_segment
from lightning_ray.store.segments import Content, OpenFiles, Segment, parquet_path, part_path
from lightning_ray.store.snapshot import SNAPSHOT, Rollouts, ended_entries, pack_entry, pack_state, split, unpack_state
from lightning_ray.store.state import RunState
from lightning_ray.store.tail import LogFile

_TASK = "task.json"


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be made into segment ``stem``: neighbouring segments, each with the rollouts to leave out,
    then log files. With log files, a snapshot of the state behind them is made as well.
    """

    folder: str
    out: str
    stem: str
    segments: list[tuple[str, list[str]]]
    logs: list[int]
    snapshot: str | None
    niceness: int = 10
    """How far the child steps back behind others."""

    @property
    def old(self) -> tuple[str, ...]:
        """The names of the segments that are replaced."""
        return tuple(stem for stem, _ in self.segments)


def snapshot_name(covered: int) -> str:
    """The name of the snapshot of the state behind that log file."""
    return f"{covered:08d}.state"


def stem_of(manifest: Manifest, old: tuple[str, ...], logs: list[int]) -> str:
    """A name for a new segment: the first and the last log file that are in it."""
    first = old[0].split("-")[0] if old else f"{logs[0]:08d}"
    last = f"{logs[-1]:08d}" if logs else old[-1].split("-")[1].split(".")[0]
    stem = f"{first}-{last}"
    return f"{stem}.{manifest.rewrites + 1}" if old else stem


def compact(task: Task) -> None:
    """Do a task: write the new segment and snapshot into the task's folder."""
    folder, out = Path(task.folder), Path(task.out)
    segments = [Segment(segments_folder(folder), stem) for stem in task.old]
    state, content = RunState(), Content()
    state.rollouts = Rollouts()
    for segment, (_, dropped) in zip(segments, task.segments, strict=True):
        for rollout_id in dropped:
            segment.drop(rollout_id)
        for event in segment.content.carried:
            _fold(event, state, content.carried)
        for rollout_id, _serial, packed in segment.content.entries:
            if rollout_id in segment.places:
                state.rollouts.put_packed(rollout_id, packed)
    if task.snapshot is not None and task.logs:
        unpack_state(read_sealed(segments_folder(folder) / task.snapshot, SNAPSHOT), state)
    log = LogFile()
    for event in _replay(folder, task.logs, log, segments):
        _fold(event, state, content.carried)
    ended = sorted(ended_entries(state), key=lambda entry: entry.serial)
    content.entries = [(entry.rollout.rollout_id, entry.serial, pack_entry(entry)) for entry in ended]
    content.statuses = dict(Counter(entry.rollout.status for entry in ended))
    content.attempts = sum(len(entry.attempts) for entry in ended)
    write_segment(out, task.stem, _rollouts(folder, segments, log), content)
    if task.logs:
        write_sealed(out / snapshot_name(task.logs[-1]), SNAPSHOT, pack_state(state))
    sync_folder(out)


def commit(task: Task, manifest: Manifest) -> tuple[Manifest, Segment]:
    """Make what a task has made part of the store. Returns the new manifest and segment."""
    folder, out = segments_folder(Path(task.folder)), Path(task.out)
    covered = task.logs[-1] if task.logs else manifest.covered
    snapshot = snapshot_name(covered) if task.logs else manifest.snapshot
    for path in (parquet_path(out, task.stem), part_path(out, task.stem)):
        path.replace(folder / path.name)
    if task.logs:
        (out / snapshot_name(covered)).replace(folder / snapshot_name(covered))
    sync_folder(folder)
    segment = Segment(folder, task.stem)
    fresh = replace(
        manifest,
        covered=covered,
        snapshot=snapshot,
        segments=manifest.replaced(task.old, task.stem),
        rewrites=manifest.rewrites + bool(task.old),
    )
    write_manifest(Path(task.folder), fresh)
    return fresh, segment


def discard(task: Task) -> None:
    """Remove the task's own folder."""
    shutil.rmtree(task.out, ignore_errors=True)


def remove_replaced(task: Task, before: Manifest) -> None:
    """Remove the files that a committed task has replaced."""
    folder = Path(task.folder)
    for stem in task.old:
        part_path(segments_folder(folder), stem).unlink(missing_ok=True)
        parquet_path(segments_folder(folder), stem).unlink(missing_ok=True)
    for number in task.logs:
        (folder / "log" / f"{number:08d}.log").unlink(missing_ok=True)
    if task.logs and before.snapshot is not None:
        (segments_folder(folder) / before.snapshot).unlink(missing_ok=True)


class Child:
    """A child process that does a task."""

    def __init__(self, task: Task) -> None:
        path = Path(task.out) / _TASK
        path.write_text(json.dumps(asdict(task)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self._told = path.with_name("errors")
        with self._told.open("wb") as told:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightning_ray.store.compaction", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=told,
                env=environment,
            )

    def wait(self, seconds: float) -> None:
        """Wait until it is done. Raises StoreError with its last words if it fails or takes longer."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise StoreError(f"the compaction was stopped after {seconds:.0f} s") from None
        finally:
            self.kill()
        if code:
            last = self._told.read_text(errors="replace").strip().splitlines()[-1:] or ["it told nothing"]
            raise StoreError(f"the compaction ended with code {code}: {last[0]}")

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def _fold(event: Event, state: RunState, carried: list[Event]) -> None:
    mine, others = split(event, state.rollouts)
    if mine is not None:
        state.apply(mine)
    if others is not None:
        carried.append(others)


def _replay(folder: Path, logs: list[int], log: LogFile, segments: list[Segment]) -> Iterator[Event]:
    notes: list[str] = []
    for record in read_log(folder, notes, False, logs):
        for event in record.events:
            if event["kind"] == "spans" and record.body is not None:
                log.add(record.body, event["runs"])
            elif event["kind"] == "deleted":
                for rollout_id in event["rollout_ids"]:
                    log.drop(rollout_id)
                    for segment in segments:
                        segment.drop(rollout_id)
            yield event
    if notes:
        raise StoreError(f"a log file that was closed has no end: {notes[0]}")


def _rollouts(folder: Path, segments: list[Segment], log: LogFile) -> Iterator[tuple[str, list[pa.RecordBatch]]]:
    """All rollouts with their rows, by first appearance."""
    bodies, files = BodyReader(folder), OpenFiles(len(segments))
    ids = [rollout_id for segment in segments for rollout_id in segment.places]
    for rollout_id in dict.fromkeys([*ids, *log.rollouts]):
        rows: list[pa.RecordBatch] = []
        for segment in segments:
            rows += segment.rows_of(rollout_id, files)
        rows += (numbered(decode_batch(bodies.read(ref)), run) for ref, run in log.places(rollout_id))
        if rows:
            yield rollout_id, rows


def _end_with_parent() -> None:
    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """The child's entry point."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    os.nice(task.niceness)
    _end_with_parent()
    pa.set_cpu_count(1)
    compact(task)
    os._exit(0)


if __name__ == "__main__":
    main()
