"""A store's folder for reading, with or without a process behind it.

What the folder holds is read on opening; later records of a writer at work are not seen, and nothing is changed.
A writer that compacts meanwhile removes files: then the folder is read anew, and may have more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.index import SpanIndex
from lightning_ray.store.loading import load, missing
from lightning_ray.store.log import log_numbers
from lightning_ray.store.manifest import Manifest, check_whole, manifest_path, read_manifest
from lightning_ray.store.reading import StoreReader
from lightning_ray.store.state import RunState

if TYPE_CHECKING:
    import pyarrow.dataset as ds

    from lightning_ray.store.shard_folder import ShardedView

T = TypeVar("T")
_OPENING_SECONDS = 30.0


class StoreView(StoreReader):
    """What a store's folder holds. Raises StoreError for damaged files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        super().__init__(RunState(), SpanIndex(self.folder))
        self._manifest = Manifest()
        self._again(self._open, opening=True)

    def scan_spans(
        self, rollout_ids: Sequence[str], attempt_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        return self._again(lambda: super(StoreView, self).scan_spans(rollout_ids, attempt_id, columns))

    def table(self) -> pa.Table:
        """All spans (SPAN_SCHEMA), in no particular order of rollouts."""
        return self._again(lambda: self.index.whole_table())

    def span_dataset(self, columns: Sequence[str] | None = None) -> list[ds.Dataset | pa.Table]:
        """All spans: datasets and tables for a query engine, in no particular order. Those with a writer
        behind them are to be read soon.
        """
        return self._again(lambda: self.index.dataset(columns))

    def refresh(self) -> None:
        """Open the folder anew, for what came later."""
        self._again(self._open, opening=True)

    def _open(self) -> None:
        manifest = read_manifest(self.folder)
        state, index, notes = RunState(), SpanIndex(self.folder), list[str]()
        check_whole(self.folder, manifest, log_numbers(self.folder))
        load(self.folder, manifest, state, index, notes, repair=False)
        index.hold()
        self.state, self.index, self.notes, self._manifest = state, index, notes, manifest

    def _again(self, read: Callable[[], T], opening: bool = False) -> T:
        """Do it; if the writer replaced files under it, open the folder anew and do it again."""
        deadline = time.monotonic() + _OPENING_SECONDS
        while True:
            before = read_manifest(self.folder) if opening else self._manifest
            try:
                return read()
            except (FileNotFoundError, StoreError) as error:
                if time.monotonic() > deadline or read_manifest(self.folder) == before:
                    if isinstance(error, StoreError):
                        raise
                    raise missing(self.folder, error) from error
            if not opening:
                self._again(self._open, opening=True)


def open_folder(folder: str | Path) -> StoreView | ShardedView:
    """A finished (or running) run's store, for reading only; one of several shards as one. Raises StoreError if
    the folder holds no store.
    """
    from lightning_ray.store.shard_folder import ShardedView, is_sharded

    if is_sharded(Path(folder)):
        return ShardedView(folder)
    if not holds_store(Path(folder)):
        raise StoreError(
            f"{folder} holds no span store (no folder 'log' and no manifest.json in it); give the store folder of a run"
        )
    return StoreView(folder)


def holds_store(folder: Path) -> bool:
    """Whether the folder is that of a single store."""
    return (folder / "log").is_dir() or manifest_path(folder).exists()
