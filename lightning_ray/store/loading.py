"""Opening a store's folder: segments, snapshot and the rest of the log, folded into a state and an index.

Deletions are honoured in their order: what was logged about rollouts that are gone since is passed over.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.index import SpanIndex
from lightning_ray.store.log import Event, log_numbers, read_log
from lightning_ray.store.manifest import Manifest, segments_folder
from lightning_ray.store.sealed import read_sealed
from lightning_ray.store.segments import Segment
from lightning_ray.store.snapshot import SNAPSHOT, Rollouts, split, unpack_state
from lightning_ray.store.state import RunState
from lightning_ray.types import TERMINAL_ROLLOUT


def missing(folder: Path, error: FileNotFoundError) -> StoreError:
    """What to raise for a file that belongs to a store and is not there."""
    return StoreError(f"{folder}: a file of the store is missing ({error}); restore it from a copy")


def load(
    folder: Path, manifest: Manifest, state: RunState, index: SpanIndex, notes: list[str], *, repair: bool
) -> None:
    """Bring an empty state and index to where the folder stands. Raises StoreError for damaged files."""
    state.rollouts = rollouts = Rollouts()
    serials: dict[str, int] = {}
    for stem in manifest.segments:
        segment = Segment(segments_folder(folder), stem)
        content = segment.content
        for event in content.carried:
            _apply(event, state, index)
        for rollout_id, serial, packed in content.entries:
            rollouts.put_packed(rollout_id, packed)
            serials[rollout_id] = serial
        state.statuses.update(content.statuses)
        state.attempts += content.attempts
        index.put_segment(segment, (), 0)
        segment.let_go_of_content()
    if manifest.snapshot is not None:
        unpack_state(read_sealed(segments_folder(folder) / manifest.snapshot, SNAPSHOT), state)
    rollouts.order(serials)
    numbers = [number for number in log_numbers(folder) if number > manifest.covered]
    for record in read_log(folder, notes, repair, numbers):
        for event in record.events:
            mine = _apply(event, state, index, record.number)
            if mine is not None and event["kind"] == "spans" and record.body is not None:
                index.add(record.body, mine["runs"])
    pa.default_memory_pool().release_unused()


def _apply(event: Event, state: RunState, index: SpanIndex, number: int = 0) -> Event | None:
    """Take in the part of a logged event whose rollouts are still there; returns it."""
    if event["kind"] == "deleted":
        for rollout_id in event["rollout_ids"]:
            index.drop(rollout_id, number)
    mine, _ = split(event, state.rollouts)
    if mine is not None:
        state.apply(mine)
        if mine.get("rollout_status") in TERMINAL_ROLLOUT:
            settle(state, mine["rollout_id"])
    return mine


def settle(state: RunState, rollout_id: str) -> None:
    """Note that a rollout has ended, so that it is packed in time."""
    if isinstance(state.rollouts, Rollouts) and rollout_id in state.rollouts:
        state.rollouts.settle(rollout_id)
