"""A store's folder copied to its mirror, at any moment of a writer at work, so that the copy is a store at any moment.

    segments and snapshot  ->  manifest  ->  log files behind it, in order  ->  what the manifest replaced is removed

The manifest comes before the log files that follow it: with one in between missing, what is there would be no store. A
log file that the writer closed, or a segment, never changes again; of the last log file the copy has the beginning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lightning_ray.mirror.sent import Content, Sent, signature
from lightning_ray.store.log import log_numbers, log_path
from lightning_ray.store.manifest import manifest_path, segments_folder
from lightning_ray.store.segments import parquet_path, part_path
from lightning_ray.store.shard_folder import is_sharded, read_layout, shard_folder

SHARDS = "shards.json"
TRIES = 5
"""Times to begin anew, as a compaction replaced files in the middle."""


def copy_store(store: Path, sent: Sent) -> None:
    """Bring the copy of a store, of all its shards, to where the store is now."""
    if not is_sharded(store):
        _copy(store, sent)
        return
    for folder in store_folders(store):
        _copy(folder, sent)
    sent.put(store / SHARDS)


def store_folders(store: Path) -> list[Path]:
    """The folder itself, or those of its shards."""
    layout = read_layout(store)
    return [store] if layout is None else [shard_folder(store, shard) for shard in range(layout.shards)]


def sealed_by(folder: Path, manifest: bytes) -> Iterator[Path]:
    """The files that a manifest of a folder names; they never change."""
    content, segments = json.loads(manifest), segments_folder(folder)
    for stem in content["segments"]:
        yield parquet_path(segments, stem)
        yield part_path(segments, stem)
    if content["snapshot"] is not None:
        yield segments / content["snapshot"]


def _copy(folder: Path, sent: Sent) -> None:
    for left in reversed(range(TRIES)):
        try:
            return _copy_once(folder, sent)
        except FileNotFoundError:
            if not left:
                raise


def _copy_once(folder: Path, sent: Sent) -> None:
    covered, sealed = 0, list[Path]()
    if (path := manifest_path(folder)).exists():
        manifest = path.read_bytes()
        covered, sealed = json.loads(manifest)["covered"], list(sealed_by(folder, manifest))
        now = signature(path)
        for file in sealed:
            sent.put(file)
        sent.write(Content(path, now, manifest))
    logs = [log_path(folder, number) for number in log_numbers(folder) if number > covered]
    for file in logs[:-1]:
        sent.put(file)
    if logs and (tail := sent.changed(logs[-1])) is not None:
        sent.write(tail)
    sent.keep(segments_folder(folder), sealed)
    sent.keep(folder / "log", logs)
