"""What a store answers to questions: its state and its spans, as the calls of ``Store`` ask for them.

Shared by the writer of a folder and by views of it. Answers are copies, made of the chosen page alone, so
that a short page of a large store is cheap. Nothing here changes the store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.query import Page, choose, result
from lightning_ray.store.schema import SPAN_SCHEMA
from lightning_ray.store.state import RolloutEntry, RunState
from lightning_ray.types import Attempt, AttemptedRollout, PaginatedResult, ResourcesUpdate, Rollout, Worker

if TYPE_CHECKING:
    import pyarrow.dataset as ds

ALL = Page()
_QUEUED = frozenset({"queuing", "requeuing"})
_LIVE = frozenset({"preparing", "running"})


class Spans(Protocol):
    """Where the spans are found."""

    @property
    def spans(self) -> int: ...

    def table(
        self, rollout_ids: list[str], attempt_id: str | None = None, columns: list[str] | None = None
    ) -> pa.Table: ...


class StoreReader:
    """Answers from a state and an index of spans."""

    def __init__(self, state: RunState, index: Spans) -> None:
        self.state = state
        self.index: Any = index
        self.notes: list[str] = []
        """What opening the folder had to drop, in words."""

    def query_rollouts(self, where: Mapping[str, Any] | None = None, page: Page = ALL) -> PaginatedResult[Rollout]:
        """The rollouts that pass the filters (``status_in``, ``rollout_id_in``, ``rollout_id_contains``,
        ``filter_logic``), each with its latest attempt if it has one; in order of creation unless sorted.
        """
        entries, where, total = self._candidates(where or {})
        chosen, total = choose(entries, Rollout, where, page, "rollout.", total)
        return result([_answer(entry) for entry in chosen], total, page)

    def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        """The rollout, with its latest attempt if it has one; or None."""
        entry = self.state.rollouts.get(rollout_id)
        return None if entry is None else _answer(entry)

    def query_attempts(self, rollout_id: str, page: Page = ALL) -> PaginatedResult[Attempt]:
        """The rollout's attempts, first to last unless sorted. Raises StoreError if it is unknown."""
        chosen, total = choose(self._entry(rollout_id).attempts, Attempt, {}, page)
        return result([attempt.model_copy() for attempt in chosen], total, page)

    def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """The rollout's last attempt, or None if it has none. Raises StoreError if the rollout is unknown."""
        attempts = self._entry(rollout_id).attempts
        return attempts[-1].model_copy() if attempts else None

    def query_workers(self, where: Mapping[str, Any] | None = None, page: Page = ALL) -> PaginatedResult[Worker]:
        """The workers that pass the filters (``status_in``, ``worker_id_contains``, ``filter_logic``)."""
        chosen, total = choose(self.state.workers.values(), Worker, where or {}, page)
        return result([worker.model_copy() for worker in chosen], total, page)

    def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """The worker, or None if the store has never heard of it."""
        worker = self.state.workers.get(worker_id)
        return None if worker is None else worker.model_copy()

    def query_resources(
        self, where: Mapping[str, Any] | None = None, page: Page = ALL
    ) -> PaginatedResult[ResourcesUpdate]:
        """The published resources that pass the filters (``resources_id``, ``resources_id_contains``)."""
        chosen, total = choose(self.state.resources.values(), ResourcesUpdate, where or {}, page)
        return result([update.model_copy() for update in chosen], total, page)

    def get_resources_by_id(self, resources_id: str) -> ResourcesUpdate | None:
        """The resources published last under that id, or None."""
        return self.state.resources.get(resources_id)

    def get_latest_resources(self) -> ResourcesUpdate | None:
        """The resources published last, or None."""
        latest = self.state.latest_resources_id
        return None if latest is None else self.state.resources[latest]

    def scan_spans(
        self, rollout_ids: Sequence[str], attempt_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The spans of rollouts as Arrow (SPAN_SCHEMA), one rollout after the other, each in order of arrival.

        ``attempt_id`` chooses one attempt, ``"latest"`` each rollout's last. Raises StoreError for unknown
        rollouts, attempts and columns.
        """
        ids = list(dict.fromkeys(rollout_ids))
        entries = [self._entry(rollout_id) for rollout_id in ids]
        chosen = None if columns is None else list(columns)
        unknown = sorted(set(chosen or ()) - set(SPAN_SCHEMA.names))
        if unknown:
            raise StoreError(f"spans have no columns {unknown}; they have {SPAN_SCHEMA.names}")
        if attempt_id == "latest":
            latest = [(entry.rollout.rollout_id, entry.attempts[-1].attempt_id) for entry in entries if entry.attempts]
            tables = [self.index.table([rollout_id], last, chosen) for rollout_id, last in latest]
            return pa.concat_tables(tables) if tables else self.index.table([], None, chosen)
        if attempt_id is not None and not any(self.state.attempt(rollout_id, attempt_id) for rollout_id in ids):
            raise StoreError(f"rollout {', '.join(map(repr, ids))} has no attempt {attempt_id!r}")
        return self.index.table(ids, attempt_id, chosen)

    def span_dataset(self, columns: Sequence[str] | None = None) -> list[ds.Dataset | pa.Table]:
        """All spans: datasets and tables for a query engine, in no particular order; to be read soon."""
        return self.index.dataset(columns)

    def refresh(self) -> None:
        """See what was written since by others; the writer itself sees all."""

    def statistics(self) -> dict[str, Any]:
        """Counts: Agent Lightning's ``total_*``; rollouts in all and by status, queued, live attempts, workers
        at work, spans; and the notes of opening.
        """
        state = self.state
        return {
            "total_rollouts": len(state.rollouts),
            "total_attempts": state.attempts,
            "total_spans": self.index.spans,
            "total_resources": len(state.resources),
            "total_workers": len(state.workers),
            "rollouts": len(state.rollouts),
            "rollouts_by_status": {status: count for status, count in sorted(state.statuses.items()) if count},
            "queued": len(state.queue),
            "live_attempts": len(state.live),
            "workers": sum(worker_id is not None for worker_id in state.by_worker),
            "spans": self.index.spans,
            "notes": list(self.notes),
        }

    def _candidates(self, where: Mapping[str, Any]) -> tuple[Collection[RolloutEntry], Mapping[str, Any], int | None]:
        """The entries that may pass, in order of creation and without a look at all if the filters allow it;
        the filters that are left; and how many will pass, if that is known.
        """
        rollouts, counts = self.state.rollouts, self.state.statuses
        filters = {key: value for key, value in where.items() if key != "filter_logic" and value is not None}
        if len(filters) > 1 and where.get("filter_logic", "and") != "and":
            return rollouts.values(), where, None
        if "rollout_id_in" in filters:
            found = [rollouts[rollout_id] for rollout_id in set(filters["rollout_id_in"]) if rollout_id in rollouts]
            return _in_order(found), {key: value for key, value in where.items() if key != "rollout_id_in"}, None
        if "status_in" not in filters:
            return rollouts.values(), where, None
        wanted = set(filters["status_in"])
        total = sum(counts[status] for status in wanted)
        known_total = total if len(filters) == 1 else None
        if not total:
            return [], where, known_total
        if not wanted <= _QUEUED | _LIVE:
            return rollouts.values(), where, known_total
        known = [*(self.state.queue if wanted & _QUEUED else ()), *(self.state.live if wanted & _LIVE else ())]
        return _in_order(rollouts[rollout_id] for rollout_id in known), where, known_total

    def _entry(self, rollout_id: str) -> RolloutEntry:
        entry = self.state.rollouts.get(rollout_id)
        if entry is None:
            raise StoreError(f"the store has no rollout {rollout_id!r}; enqueue it first")
        return entry


def attempted(entry: RolloutEntry, attempt: Attempt) -> AttemptedRollout:
    """A copy of a rollout with one of its attempts."""
    return AttemptedRollout.model_construct(**dict(entry.rollout), attempt=attempt.model_copy())


def _answer(entry: RolloutEntry) -> Rollout:
    return attempted(entry, entry.attempts[-1]) if entry.attempts else entry.rollout.model_copy()


def _in_order(entries: Iterable[RolloutEntry]) -> list[RolloutEntry]:
    return sorted(entries, key=lambda entry: entry.serial)
