"""A sharded store's folder: ``shard-000``, ``shard-001``, ... are stores; ``shards.json`` says how many there are.

The number belongs to the folder: with another one rollouts would be looked for where they are not. Shards may lie on
other nodes' disks; ``shards.json`` then tells the nodes, and lies where the run was started.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from lightning_ray.errors import StoreError
from lightning_ray.store.query import Page, select
from lightning_ray.store.sealed import sync_folder
from lightning_ray.store.shard_merge import (
    HOME,
    by_shard,
    first_rows,
    in_order,
    merge_rollouts,
    merge_statistics,
    merge_worker,
    merge_workers,
    shard_of,
)
from lightning_ray.store.view import StoreView, holds_store
from lightning_ray.types import Attempt, PaginatedResult, ResourcesUpdate, Rollout, Worker

ALL = Page()
_FILE = "shards.json"


@dataclass(frozen=True)
class ShardLayout:
    """How many shards a folder has, and the addresses of the nodes they are on."""

    shards: int
    nodes: list[str]


def shard_folder(folder: Path, shard: int) -> Path:
    """The folder of one shard."""
    return folder / f"shard-{shard:03d}"


def read_layout(folder: Path) -> ShardLayout | None:
    """What ``shards.json`` says; None if there is none: a store without shards, or a new one."""
    file = folder / _FILE
    try:
        return ShardLayout(**json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged ({error}); restore it: {{'shards': N, 'nodes': [...]}}") from error


def is_sharded(folder: Path) -> bool:
    """Whether the folder is that of several stores."""
    return (folder / _FILE).exists()


def check_layout(folder: Path, shards: int) -> ShardLayout | None:
    """The folder's layout, or None if it is new. Raises StoreError if it has another number of shards."""
    layout = read_layout(folder)
    there = layout.shards if layout else 1 if holds_store(folder) else shards
    if there != shards:
        raise StoreError(
            f"the store in {folder} has {there} shard(s) and cannot be opened with {shards}: set "
            f"store_shards={there}, or take a new folder"
        )
    return layout


def write_layout(folder: Path, layout: ShardLayout) -> None:
    """Write ``shards.json``, durably, whole or not at all."""
    draft = folder / f".{_FILE}"
    with draft.open("w") as file:
        json.dump(asdict(layout), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / _FILE)
    sync_folder(folder)


class ShardedView:
    """What the stores of a folder's shards hold, as a StoreView; for reading only.

    Raises StoreError if a shard is not here, or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        layout = read_layout(self.folder)
        if layout is None:
            raise StoreError(f"{folder} holds no sharded span store (no file {_FILE!r} in it)")
        for shard, node in zip(range(layout.shards), layout.nodes, strict=True):
            if not shard_folder(self.folder, shard).is_dir():
                raise StoreError(
                    f"{shard_folder(self.folder, shard)} is not here; it was written on node {node}, where it is to be "
                    "copied from"
                )
        self.shards = [StoreView(shard_folder(self.folder, shard)) for shard in range(layout.shards)]
        """The views to merge; shard 0 is the home of resources."""

    @property
    def notes(self) -> list[str]:
        """What opening had to drop, in words."""
        return [f"{view.folder.name}: {note}" for view in self.shards for note in view.notes]

    def query_rollouts(self, where: Mapping[str, Any] | None = None, page: Page = ALL) -> PaginatedResult[Rollout]:
        """See StoreView; unsorted they are in order of ``start_time``."""
        return merge_rollouts([view.query_rollouts(where, first_rows(page)) for view in self.shards], page)

    def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        """See StoreView."""
        return self._view(rollout_id).get_rollout_by_id(rollout_id)

    def query_attempts(self, rollout_id: str, page: Page = ALL) -> PaginatedResult[Attempt]:
        """See StoreView."""
        return self._view(rollout_id).query_attempts(rollout_id, page)

    def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """See StoreView."""
        return self._view(rollout_id).get_latest_attempt(rollout_id)

    def query_workers(self, where: Mapping[str, Any] | None = None, page: Page = ALL) -> PaginatedResult[Worker]:
        """See StoreView."""
        return select(self._workers(), Worker, where or {}, page)

    def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """See StoreView."""
        seen = [worker for view in self.shards if (worker := view.get_worker_by_id(worker_id)) is not None]
        return merge_worker(seen) if seen else None

    def query_resources(
        self, where: Mapping[str, Any] | None = None, page: Page = ALL
    ) -> PaginatedResult[ResourcesUpdate]:
        """See StoreView."""
        return self.shards[HOME].query_resources(where, page)

    def get_resources_by_id(self, resources_id: str) -> ResourcesUpdate | None:
        """See StoreView."""
        return self.shards[HOME].get_resources_by_id(resources_id)

    def get_latest_resources(self) -> ResourcesUpdate | None:
        """See StoreView."""
        return self.shards[HOME].get_latest_resources()

    def scan_spans(
        self, rollout_ids: Sequence[str], attempt_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """See StoreView."""
        ids = list(rollout_ids)
        if attempt_id not in (None, "latest"):
            having = [
                each for each in ids if attempt_id in {attempt.attempt_id for attempt in self.query_attempts(each)}
            ]
            ids = having or ids
        places = by_shard(ids, len(self.shards)) or {HOME: []}
        wanted = None if columns is None else list(dict.fromkeys([*columns, "rollout_id"]))
        tables = [
            self.shards[shard].scan_spans([ids[place] for place in mine], attempt_id, wanted)
            for shard, mine in places.items()
        ]
        spans = in_order(tables, ids)
        return spans if columns is None else spans.select(list(columns))

    def table(self) -> pa.Table:
        """See StoreView."""
        return pa.concat_tables([view.table() for view in self.shards])

    def span_dataset(self, columns: Sequence[str] | None = None) -> list[ds.Dataset | pa.Table]:
        """See StoreView."""
        return [part for view in self.shards for part in view.span_dataset(columns)]

    def statistics(self) -> dict[str, Any]:
        """See StoreView."""
        summed = merge_statistics([view.statistics() for view in self.shards], self._workers())
        return {**summed, "notes": self.notes}

    def _workers(self) -> list[Worker]:
        return merge_workers(view.query_workers() for view in self.shards)

    def _view(self, rollout_id: str) -> StoreView:
        return self.shards[shard_of(rollout_id, len(self.shards))]
