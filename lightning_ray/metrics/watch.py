"""Looks at a run every few seconds and exports what it sees: queue, rollouts, spans, disk, restarts.

What cannot be had at the moment (the store is on its way back, say) is left as it was; who needs it tells of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from lightning_ray.metrics.exporter import Exporter
from lightning_ray.types import RolloutStatus

WATCH_SECONDS = 5.0
ANSWER_SECONDS = 20.0
"""For one look, before the next is tried."""
ENDED = ("succeeded", "failed", "cancelled")


class Store(Protocol):
    """What of the span store is needed."""

    async def statistics(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Watched:
    """A run, as it is looked at."""

    name: str
    folder: Path
    store: Store
    step: Callable[[], int]
    """Steps made."""
    runners: Callable[[], int]
    """How many are up."""
    restarts: Callable[[], Mapping[str, int]]
    """By part, those that are counted where they happen."""
    replicas: Callable[[], Mapping[str, Collection[Hashable]]]
    """By policy, which replicas answered when they were last asked."""
    bounds: Mapping[str, int]
    """``max_staleness`` by policy."""
    stores: Callable[[], Awaitable[Collection[Hashable]]]
    """The store's processes."""


class Restarts:
    """Counts, of processes that are seen from time to time, those that took another's place."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._most = 0

    def see(self, present: Collection[Hashable]) -> int:
        """How many more there have been than ever were at once."""
        self._seen |= set(present)
        self._most = max(self._most, len(present))
        return len(self._seen) - self._most


class RunWatch:
    """See the module."""

    def __init__(self, watched: Watched):
        self._watched = watched
        self._export = Exporter(run=watched.name)
        self._restarts = {part: Restarts() for part in ("replica", "store")}
        self._spans: int | None = None
        self._progress: tuple[int, int] | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for look in (self.see_store, self.see_processes):
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(ANSWER_SECONDS):
                        await look()
            await asyncio.sleep(WATCH_SECONDS)

    async def see_store(self) -> None:
        """The queue, the rollouts, the spans, the disk."""
        watched, export = self._watched, self._export
        known = await watched.store.statistics()
        by_status: Mapping[str, int] = known["rollouts_by_status"]
        export.set("queue_length", known["queued"])
        export.set("running_rollouts", known["live_attempts"])
        for status in get_args(RolloutStatus):
            export.set("store_rollouts", by_status.get(status, 0), status=status)
        self._export.add("spans", 0 if self._spans is None else known["spans"] - self._spans)
        self._spans = known["spans"]
        export.set("store_bytes", known.get("disk_bytes"))
        export.set("disk_free_bytes", (await asyncio.to_thread(shutil.disk_usage, watched.folder)).free)
        progress = watched.step(), sum(by_status.get(status, 0) for status in ENDED)
        if progress != self._progress:
            self._progress = progress
            export.set("last_progress_timestamp_seconds", time.time())

    async def see_processes(self) -> None:
        """How many there are, and which were started anew."""
        watched, export = self._watched, self._export
        replicas = watched.replicas()
        export.set("runners", watched.runners())
        for policy, bound in watched.bounds.items():
            export.set("staleness_bound", bound, policy=policy)
        for policy, present in replicas.items():
            export.set("replicas", len(present), policy=policy)
        for part, count in watched.restarts().items():
            export.set("restarts", count, part=part)
        self._restarted("replica", [(policy, one) for policy, present in replicas.items() for one in present])
        self._restarted("store", await watched.stores())

    def _restarted(self, part: str, present: Collection[Hashable]) -> None:
        self._export.set("restarts", self._restarts[part].see(present), part=part)
