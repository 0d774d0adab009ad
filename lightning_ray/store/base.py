"""The store's calls as users make them: Agent Lightning 0.3's contract, and the columnar calls beside it.

All answers are durable and all calls may be resent: ids are chosen here, before the first sending. A client
is a ``Store`` with one method, ``_call``, that has a StoreService somewhere do a call by name. Spans travel as
Arrow, and are made into objects and filtered here, so that the service never decodes what it holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.lifecycle import new_id
from lightning_ray.store.query import Page, select
from lightning_ray.store.schema import SPAN_SCHEMA, encode_batch, read_spans, spans_to_batch
from lightning_ray.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EnqueueRolloutRequest,
    FilterLogic,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    SortOrder,
    Span,
    TaskInput,
    Unset,
    Worker,
    WorkerStatus,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

_FOREVER = 3600.0
_WITHOUT_TOKENS = [field.name for field in SPAN_SCHEMA if not pa.types.is_list(field.type)]


class Finish(NamedTuple):
    """How an attempt ended, for ``finish_many_attempts``."""

    rollout_id: str
    attempt_id: str
    status: str
    metadata: dict[str, Any] | None = None


class Store(ABC):
    """The store of a run: queue, lifecycle, spans and resources.

    StoreError (a ValueError) means refused, do not resend; InfrastructureError that the store is out of reach
    or its disk failed.
    """

    @property
    def capabilities(self) -> dict[str, bool]:
        """What callers may rely on, in Agent Lightning's terms."""
        return {"thread_safe": False, "async_safe": True, "zero_copy": True, "otlp_traces": False}

    @property
    def actors(self) -> list[Any]:
        """Handles of the Ray actors behind it."""
        return []

    def otlp_traces_endpoint(self) -> str:
        """The URL to which OpenTelemetry exporters post traces. Raises StoreError if the store has none."""
        raise StoreError(
            f"a {type(self).__name__} has no OTLP endpoint; serve the store with deployments/store_api.py and use "
            "HttpStoreClient"
        )

    # --- rollouts: create and claim -------------------------------------------------------------------------

    def new_rollout_id(self, near: str | None = None) -> str:
        """A fresh id. Rollouts of the same ``near``, a group's id say, lie in the same shard, if there are several:
        what is queued, waited for and read together then takes one message and not one for each.
        """
        return new_id("ro")

    async def enqueue_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        *,
        rollout_id: str | None = None,
    ) -> Rollout:
        """Queue one rollout; see ``enqueue_many_rollouts``."""
        request = EnqueueRolloutRequest(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata, rollout_id=rollout_id
        )
        return (await self.enqueue_many_rollouts([request]))[0]

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        """Queue rollouts, with the latest resources unless they name others.

        One whose ``rollout_id`` is known is answered as it stands. Raises StoreError for unknown resources.
        """
        return await self._call("enqueue_many_rollouts", [_named(request) for request in rollouts])

    async def start_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
        *,
        rollout_id: str | None = None,
    ) -> AttemptedRollout:
        """Create a rollout and its first attempt at once, past the queue.

        With a ``worker_id`` the attempt is leased to it, as by a dequeue; without one it is bound by its
        rollout's own timeouts alone. Raises StoreError for unknown resources, or a rollout that has ended.
        """
        request = _named(
            EnqueueRolloutRequest(
                input=input,
                mode=mode,
                resources_id=resources_id,
                config=config,
                metadata=metadata,
                rollout_id=rollout_id,
            )
        )
        return await self._call("start_rollout", request, new_id("at"), worker_id)

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None = None, *, attempt_id: str | None = None
    ) -> AttemptedRollout:
        """Begin a further attempt of a rollout, past the queue and beyond ``max_attempts``.

        An attempt still at work is given up as failed. Raises StoreError if the rollout is unknown or has
        ended.
        """
        return await self._call("start_attempt", rollout_id, attempt_id or new_id("at"), worker_id)

    async def dequeue_rollout(
        self, worker_id: str | None = None, *, timeout: float = 0.0, request_id: str | None = None
    ) -> AttemptedRollout | None:
        """Lease the oldest queued rollout, or None; see ``dequeue_many_rollouts``."""
        claims = await self.dequeue_many_rollouts(limit=1, worker_id=worker_id, timeout=timeout, request_id=request_id)
        return claims[0] if claims else None

    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        timeout: float = 0.0,
        request_id: str | None = None,
    ) -> list[AttemptedRollout]:
        """Lease up to ``limit`` rollouts, first what was lost with a worker that played several, then the oldest; with
        an empty queue wait up to ``timeout`` seconds for one.

        The lease is renewed by ``heartbeat`` and by spans. Resending with the same ``request_id`` gives the
        same claims.
        """
        if limit <= 0:
            return []
        return await self._call("dequeue_many_rollouts", limit, worker_id, request_id or new_id("rq"), timeout=timeout)

    # --- rollouts: change and end ---------------------------------------------------------------------------

    async def update_rollout(
        self,
        rollout_id: str,
        input: TaskInput | Unset = UNSET,
        mode: RolloutMode | Unset | None = UNSET,
        resources_id: str | Unset | None = UNSET,
        status: RolloutStatus | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: dict[str, Any] | Unset | None = UNSET,
    ) -> Rollout:
        """Change a rollout; None clears a field.

        A terminal ``status`` ends the attempt at work, whose worker is told at its next heartbeat;
        ``"queuing"`` and ``"requeuing"`` give that attempt up and queue the rollout again. The status of a
        rollout that has ended stays as it is: see the answer's. Raises StoreError if the rollout or its new
        resources are unknown.
        """
        changes = _given(
            input=input, mode=mode, resources_id=resources_id, status=status, config=config, metadata=metadata
        )
        return await self._call("update_rollout", rollout_id, changes)

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"],
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | Unset = UNSET,
        last_heartbeat_time: float | Unset = UNSET,
        metadata: dict[str, Any] | Unset | None = UNSET,
    ) -> Attempt:
        """Change an attempt; a terminal ``status`` ends it, and decides on its rollout with ``RolloutConfig``.

        The status of an attempt that has ended stays as it is. Raises StoreError if it is unknown.
        """
        changes = _given(status=status, worker_id=worker_id, last_heartbeat_time=last_heartbeat_time, metadata=metadata)
        return await self._call("update_attempt", rollout_id, attempt_id, changes)

    async def finish_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: str,
        spans: pa.RecordBatch | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        """End one attempt and store its last spans; see ``finish_many_attempts``."""
        return (await self.finish_many_attempts([Finish(rollout_id, attempt_id, status, metadata)], spans))[0]

    async def finish_many_attempts(
        self, finishes: Sequence[Finish], spans: pa.RecordBatch | None = None
    ) -> list[Rollout]:
        """End attempts and store their last spans, all or nothing; returns their rollouts as they then stand.

        An attempt that has ended stays as it is; its spans are stored all the same. ``metadata`` with
        ``infrastructure: True`` (and a ``reason``) marks a failure that is not the agent's and does not count
        against ``max_attempts``. Raises StoreError for an unknown attempt, a status that ends nothing, or
        spans of other attempts.
        """
        encoded = None if spans is None or not spans.num_rows else encode_batch(spans)
        return await self._call("finish_many_attempts", [tuple(finish) for finish in finishes], encoded)

    async def delete_rollouts(self, rollout_ids: Sequence[str]) -> list[str]:
        """Remove rollouts with all their attempts and spans; returns the ids that were there.

        Those at work are given up. The disk space comes back with the next compaction.
        """
        return await self._call("delete_rollouts", list(rollout_ids))

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        """Wait until all have ended, at most ``timeout`` seconds (None: for ever); returns those that have.

        Raises StoreError if one is unknown.
        """
        ids = list(rollout_ids)
        if timeout is not None:
            return await self._call("wait_for_rollouts", ids, timeout=timeout)
        while len(ended := await self._call("wait_for_rollouts", ids, timeout=_FOREVER)) < len(set(ids)):
            pass
        return ended

    # --- workers --------------------------------------------------------------------------------------------

    async def heartbeat(self, worker_id: str, attempts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Renew the leases of the (rollout, attempt) ids a worker is at; returns those it is to stop."""
        stop = await self._call("heartbeat", worker_id, [tuple(pair) for pair in attempts])
        return [(rollout_id, attempt_id) for rollout_id, attempt_id in stop]

    async def update_worker(self, worker_id: str, heartbeat_stats: dict[str, Any] | Unset = UNSET) -> Worker:
        """Note a sign of life of a worker, and how it is. Renews the leases of all it is at."""
        stats = None if isinstance(heartbeat_stats, Unset) else heartbeat_stats
        return await self._call("update_worker", worker_id, stats)

    async def release_worker(self, worker_id: str, reason: str) -> list[str]:
        """Queue again what a dead worker was at; returns the rollouts' ids.

        A worker that is started again takes a new id.
        """
        return await self._call("release_worker", worker_id, reason)

    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        """The workers that pass the filters."""
        where = _given(status_in=status_in, worker_id_contains=worker_id_contains, filter_logic=filter_logic)
        return await self._call("query_workers", where, Page(sort_by, sort_order, limit, offset))

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """The worker, or None if the store has never heard of it."""
        return await self._call("get_worker_by_id", worker_id)

    # --- spans ----------------------------------------------------------------------------------------------

    async def append_spans(self, batch: pa.RecordBatch, synced: bool = True) -> list[int]:
        """Store spans (SPAN_SCHEMA), each once by (rollout, attempt, span id); returns the rows left out
        because they were there.

        Without ``synced`` it returns once no process's death can lose them; they are on the disk a second later, and
        in any case before the end of their attempt is told, or anything of them is read. So if the machine fails,
        only attempts that were at work, and are played again, may lack spans.

        A ``sequence_id`` of 0 is replaced by the rollout's next number. Raises StoreError naming the
        rollouts and attempts that the store does not know, after the other rows were stored.
        """
        encoded = encode_batch(batch)
        return await (self._call("append_spans", encoded) if synced else self._call("append_spans", encoded, False))

    async def add_many_spans(self, spans: Sequence[Span]) -> list[Span]:
        """Store spans; returns those that were not there yet. See ``append_spans``."""
        if not spans:
            return []
        left_out = set(await self.append_spans(spans_to_batch(spans)))
        return [span for row, span in enumerate(spans) if row not in left_out]

    async def add_span(self, span: Span) -> Span | None:
        """Store one span; None if it was there."""
        stored = await self.add_many_spans([span])
        return stored[0] if stored else None

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: ReadableSpan, sequence_id: int | None = None
    ) -> Span | None:
        """Store a span of OpenTelemetry's SDK; None if it was there. Without ``sequence_id`` it gets the
        rollout's next.
        """
        if sequence_id is None:
            sequence_id = await self.get_next_span_sequence_id(rollout_id, attempt_id)
        return await self.add_span(Span.from_opentelemetry(readable_span, rollout_id, attempt_id, sequence_id))

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """The next number in the order of a rollout's spans: 1, 2, ... Raises StoreError if the attempt is
        unknown.
        """
        return (await self.get_many_span_sequence_ids([(rollout_id, attempt_id)]))[0]

    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> list[int]:
        """The next number for each (rollout, attempt) id, in order; a rollout named twice gets two."""
        return await self._call("get_many_span_sequence_ids", [tuple(pair) for pair in rollout_attempt_ids])

    async def scan_spans(
        self,
        rollout_ids: Sequence[str],
        attempt_id: str | Literal["latest"] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The spans of rollouts as Arrow (SPAN_SCHEMA), one rollout after the other, each in order of arrival.

        Raises StoreError for unknown rollouts, attempts and columns.
        """
        chosen = None if columns is None else list(columns)
        return await self._call("scan_spans", list(rollout_ids), attempt_id, chosen)

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"] | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
    ) -> PaginatedResult[Span]:
        """The spans of a rollout, of one attempt or of all, that pass the filters.

        Token columns stay in the store: ``scan_spans`` has them. Raises StoreError if the rollout or attempt
        is unknown, or ``sort_by`` is no field.
        """
        where = _given(
            trace_id=trace_id,
            trace_id_contains=trace_id_contains,
            span_id=span_id,
            span_id_contains=span_id_contains,
            parent_id=parent_id,
            parent_id_contains=parent_id_contains,
            name=name,
            name_contains=name_contains,
            filter_logic=filter_logic,
        )
        spans = read_spans(await self.scan_spans([rollout_id], attempt_id, _WITHOUT_TOKENS))
        return select(spans, Span, where, Page(sort_by, sort_order, limit, offset))

    async def sql(self, query: str) -> pa.Table:
        """The answer of one read-only SQL query over the tables of ``store.sql``. Raises StoreError for bad
        SQL.
        """
        return await self._call("sql", query)

    # --- rollouts, attempts, resources: query ---------------------------------------------------------------

    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus] | None = None,
        rollout_ids: Sequence[str] | None = None,
    ) -> PaginatedResult[Rollout]:
        """The rollouts that pass the filters, with their latest attempt if they have one (AttemptedRollout).

        In order of creation unless sorted. ``status`` and ``rollout_ids`` are the older names of the ``_in``
        filters.
        """
        where = _given(
            status_in=status_in if status_in is not None else status,
            rollout_id_in=rollout_id_in if rollout_id_in is not None else rollout_ids,
            rollout_id_contains=rollout_id_contains,
            filter_logic=filter_logic,
        )
        return await self._call("query_rollouts", where, Page(sort_by, sort_order, limit, offset))

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        """The rollout (with its latest attempt, if any: AttemptedRollout), or None."""
        return await self._call("get_rollout_by_id", rollout_id)

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        """The attempts of a rollout, first to last. Raises StoreError if it is unknown."""
        return await self._call("query_attempts", rollout_id, Page(sort_by, sort_order, limit, offset))

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """The rollout's last attempt, or None if it has none. Raises StoreError if the rollout is unknown."""
        return await self._call("get_latest_attempt", rollout_id)

    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under a new id, as the latest."""
        return await self.update_resources(new_id("rs"), resources)

    async def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under an id, as the latest; the same content again is no new version."""
        return await self._call("update_resources", resources_id, resources)

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        """The published resources, in order of their first publication unless sorted."""
        where = _given(resources_id=resources_id, resources_id_contains=resources_id_contains)
        return await self._call("query_resources", where, Page(sort_by, sort_order, limit, offset))

    async def get_resources_by_id(self, resources_id: str) -> ResourcesUpdate | None:
        """The resources published last under that id, or None."""
        return await self._call("get_resources_by_id", resources_id)

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        """The resources published last, or None."""
        return await self._call("get_latest_resources")

    # --- the store itself -----------------------------------------------------------------------------------

    async def statistics(self) -> dict[str, Any]:
        """Counts and sizes; Agent Lightning's keys (name, total_rollouts, total_spans, uptime, ...) and ours."""
        return await self._call("statistics")

    async def compact(self) -> None:
        """Bring all that is stored into its long-term form now, rather than in the background; what was deleted is then
        off the disk.
        """
        await self._call("compact")

    @abstractmethod
    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """Have the service do one call; ``timeout`` is how long it may wait inside the store, in seconds."""


def _named(request: EnqueueRolloutRequest) -> EnqueueRolloutRequest:
    return request if request.rollout_id else request.model_copy(update={"rollout_id": new_id("ro")})


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that were given: not UNSET, and, for filters, not None."""
    is_filter = "filter_logic" in arguments or "resources_id_contains" in arguments
    return {
        key: list(value) if isinstance(value, Iterable) and key.endswith("_in") else value
        for key, value in arguments.items()
        if not isinstance(value, Unset) and not (is_filter and value is None)
    }
