"""What belongs to a store: its segments in order, the snapshot of its state, and the log files they replace.

The manifest is replaced in one step, so a store is always the one before a compaction or the one after it. What
lies in the folder and is not named is left over from a process that died, and of no meaning.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lightning_ray.errors import StoreError
from lightning_ray.store.schema import SCHEMA_VERSION
from lightning_ray.store.sealed import sync_folder

_FORMAT = "lightning-ray span store"
_FIX = "restore it from a copy of the store's folder"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parts of a store. ``covered`` is the last log file that the segments replace, 0 if none."""

    covered: int = 0
    snapshot: str | None = None
    segments: tuple[str, ...] = ()
    rewrites: int = 0
    """How many segments were written in place of others, so that each has a name of its own."""

    def replaced(self, old: tuple[str, ...], new: str | None) -> tuple[str, ...]:
        """The segments, with ``new`` in the place of the neighbours ``old``, or at the end if those are
        none.
        """
        at = self.segments.index(old[0]) if old else len(self.segments)
        fresh = () if new is None else (new,)
        return self.segments[:at] + fresh + self.segments[at + len(old) :]


def manifest_path(folder: Path) -> Path:
    """Where a store's manifest lies."""
    return folder / "manifest.json"


def segments_folder(folder: Path) -> Path:
    """Where a store's segments and snapshot lie."""
    return folder / "segments"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store, empty before the first compaction. Raises StoreError if it is damaged."""
    path = manifest_path(folder)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Manifest()
    try:
        content = json.loads(text)
        told = content.pop("checksum")
        if told != _checksum(content):
            raise ValueError("its checksum is wrong")
    except (ValueError, AttributeError, KeyError) as error:
        raise StoreError(f"{path}: the manifest is damaged ({error}); {_FIX}") from error
    if content["format"] != _FORMAT or content["version"] != SCHEMA_VERSION:
        raise StoreError(
            f"{path} is of version {content['version']}; this lightning-ray reads version {SCHEMA_VERSION}"
        )
    fields = {name: content[name] for name in Manifest.__dataclass_fields__}
    return replace(Manifest(**fields), segments=tuple(fields["segments"]))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of the last, durably."""
    content = {"format": _FORMAT, "version": SCHEMA_VERSION, **asdict(manifest), "segments": list(manifest.segments)}
    path = manifest_path(folder)
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        json.dump({**content, "checksum": _checksum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(folder)


def check_whole(folder: Path, manifest: Manifest, numbers: list[int]) -> None:
    """Raise StoreError if log files or the manifest are missing; ``numbers`` are the log files there are."""
    later = [number for number in numbers if number > manifest.covered]
    expected = list(range(manifest.covered + 1, manifest.covered + 1 + len(later)))
    if later != expected:
        missing = min(set(expected) - set(later))
        hint = "" if manifest_path(folder).exists() else ", or manifest.json"
        raise StoreError(f"{folder}: log file {missing:08d}.log{hint} is missing; {_FIX}")
    if not numbers and not manifest.segments and any(segments_folder(folder).glob("*.rollouts")):
        raise StoreError(f"{manifest_path(folder)} is missing; {_FIX}")


def clean(folder: Path, manifest: Manifest) -> None:
    """Remove what a writer that died left over."""
    manifest_path(folder).with_suffix(".new").unlink(missing_ok=True)
    for path in (folder / "log").glob("*.log"):
        if int(path.stem) <= manifest.covered:
            path.unlink()
    if not segments_folder(folder).is_dir():
        return
    for path in segments_folder(folder).iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != manifest.snapshot and path.stem not in manifest.segments:
            path.unlink()


def _checksum(content: dict[str, object]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
