"""The reading half of the store: what a run's folder holds, with or without a process behind it.

The log is replayed on opening; later records of a writer at work are not seen. Nothing is changed in the
folder. Spans are read in place from the log's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.index import SpanIndex
from lightning_ray.store.lifecycle import Lifecycle
from lightning_ray.store.log import read_log
from lightning_ray.types import Attempt, ResourcesUpdate, Rollout


class StoreView:
    """What a store's folder holds, read once on opening. Raises StoreError for a damaged log."""

    def __init__(self, folder: str | Path, *, lease_seconds: float = 60.0, repair: bool = False) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []
        """What the replay had to drop, in words."""
        self._lifecycle = Lifecycle(lease_seconds)
        self._index = SpanIndex(self.folder)
        for record in read_log(self.folder, self.notes, repair):
            for event in record.events:
                self._lifecycle.state.apply(event)
                if event["kind"] == "spans" and record.body is not None:
                    self._index.add(record.body, event["runs"])

    def query_rollouts(
        self, status_in: Sequence[str] | None = None, rollout_id_in: Sequence[str] | None = None
    ) -> list[Rollout]:
        """The rollouts that pass both filters; in order of enqueueing, or of the ids if there are any."""
        entries = self._lifecycle.state.rollouts
        if rollout_id_in is None:
            chosen = list(entries.values())
        else:
            chosen = [entries[rollout_id] for rollout_id in dict.fromkeys(rollout_id_in) if rollout_id in entries]
        return [
            entry.rollout.model_copy() for entry in chosen if status_in is None or entry.rollout.status in status_in
        ]

    def query_attempts(self, rollout_id: str) -> list[Attempt]:
        """The rollout's attempts, in order. Raises StoreError if it is unknown."""
        return self._lifecycle.attempts(rollout_id)

    def query_spans(self, rollout_id_in: Sequence[str]) -> pa.Table:
        """The spans of the rollouts (SPAN_SCHEMA), one rollout after the other, each in order of arrival; all
        attempts.
        """
        return self._index.table(list(rollout_id_in))

    def table(self) -> pa.Table:
        """All spans (SPAN_SCHEMA), in order of arrival, read in place from the log."""
        return self._index.whole_table()

    def get_resources_by_id(self, resources_id: str) -> ResourcesUpdate | None:
        """The resources published last under that id, or None."""
        return self._lifecycle.state.resources.get(resources_id)

    def get_latest_resources(self) -> ResourcesUpdate | None:
        """The resources published last, or None."""
        latest = self._lifecycle.state.latest_resources_id
        return None if latest is None else self._lifecycle.state.resources[latest]

    def statistics(self) -> dict[str, Any]:
        """Counts: rollouts (in all and by status), queued, live attempts, spans; and the replay's notes."""
        state = self._lifecycle.state
        return {
            "rollouts": len(state.rollouts),
            "rollouts_by_status": {status: count for status, count in sorted(state.statuses.items()) if count},
            "queued": len(state.queue),
            "live_attempts": len(state.live),
            "workers": sum(worker_id is not None for worker_id in state.by_worker),
            "spans": self._index.spans,
            "notes": list(self.notes),
        }


def open_folder(folder: str | Path) -> StoreView:
    """A finished (or running) run's store, for reading only. Raises StoreError if the folder holds no
    store.
    """
    if not (Path(folder) / "log").is_dir():
        raise StoreError(f"{folder} holds no span store (no folder 'log' in it); give the store folder of a run")
    return StoreView(folder)
