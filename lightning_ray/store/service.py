"""The store as concurrent callers see it: waits that end, group commits, and a watchdog.

Wraps one SpanStore in one event loop. An answer is given only when all it tells is durable: callers that
arrive while a sync is under way share the next one. Nothing polls: a dequeue waits for the queue, a wait for
rollouts waits for their ends. Shared by the actor and the client without Ray; how calls get here is theirs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

from lightning_ray.errors import LightningRayError, StoreError
from lightning_ray.store.core import SpanStore
from lightning_ray.store.lifecycle import Ending
from lightning_ray.store.log import Event
from lightning_ray.store.query import Page
from lightning_ray.store.schema import decode_batch
from lightning_ray.types import TERMINAL_ROLLOUT, AttemptedRollout, Rollout

T = TypeVar("T")
WATCH_SECONDS = 1.0
"""From one look of the watchdog to the next, which also syncs what nobody waits for."""
_PLAIN_CALLS = frozenset(
    {
        "enqueue_many_rollouts",
        "start_rollout",
        "start_attempt",
        "dequeue_many_rollouts",
        "get_many_span_sequence_ids",
        "update_rollout",
        "update_attempt",
        "update_worker",
        "update_resources",
        "heartbeat",
        "delete_rollouts",
        "get_rollout_by_id",
        "get_latest_attempt",
        "get_worker_by_id",
        "get_resources_by_id",
        "get_latest_resources",
        "scan_spans",
        "statistics",
    }
)
_QUERIES = frozenset({"query_rollouts", "query_attempts", "query_workers", "query_resources"})
_log = logging.getLogger(__name__)


class StoreService:
    """Async calls on a SpanStore; all in one event loop.

    Made inside that loop the watchdog begins at once, otherwise with the first call.
    """

    def __init__(self, store: SpanStore) -> None:
        store.defer_sync, store.observe = True, self._observe
        self.store = store
        self._synced = store.records
        self._syncing: asyncio.Task[None] | None = None
        self._sync_thread = ThreadPoolExecutor(1, thread_name_prefix="store-sync")
        self._watchdog: asyncio.Task[None] | None = None
        self._hungry: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._watching: set[asyncio.Future[None]] = set()
        self._waits: defaultdict[str, set[_Wait]] = defaultdict(set)
        self._releases: Counter[str | None] = Counter()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        self._watch()

    async def call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """One call of the protocol (see ``base``): spans as ``encode_batch`` gives them, all else as it is."""
        if self.is_immediate(name, timeout):
            if not self.is_synced(name, args):
                return self.do(name, *args)
            return await self._answer(lambda: self.do(name, *args))
        self._watch()
        if name in _WAITING:
            return await _WAITING[name](self, timeout, *args)
        return await _LONG[name](self, *args)

    def is_immediate(self, name: str, timeout: float | None) -> bool:
        """Whether ``do`` can do a call; all others take time."""
        return name not in _LONG and not (timeout and name in _WAITING)

    def is_synced(self, name: str, args: Sequence[Any]) -> bool:
        """Whether a call's answer is to be given after ``durable``."""
        return name != "append_spans" or len(args) < 2 or bool(args[1])

    def do(self, name: str, *args: Any) -> Any:
        """Do one call now. Its answer is to be given after ``durable`` if ``is_synced`` says so, whatever else
        happens till then.
        """
        self._watch()
        if name in _PLAIN_CALLS:
            return getattr(self.store, name)(*args)
        if name in _QUERIES:
            return getattr(self.store, name)(*args[:-1], Page(*args[-1]))
        if name == "append_spans":
            return self.store.append_spans(decode_batch(args[0]), args[0])
        if name == "finish_many_attempts":
            return self._finish(*args)
        if name == "release_worker":
            return self._release(*args)
        if name == "wait_for_queue":
            return bool(self.store.queued)
        if name == "wait_for_rollouts":
            self._check_known(*args)
            return self._ended(*args)
        raise StoreError(f"the store has no call {name!r}")

    async def durable(self) -> None:
        """Wait until all that was done so far is durable."""
        wanted = self.store.records
        while self._synced < wanted:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.ensure_future(self._sync())
            await asyncio.shield(self._syncing)

    async def dequeue(
        self, timeout: float, limit: int, worker_id: str | None, request_id: str
    ) -> list[AttemptedRollout]:
        """Lease rollouts; with an empty queue wait up to ``timeout`` seconds, or for the worker's release."""
        loop = asyncio.get_running_loop()
        deadline, releases = loop.time() + timeout, self._releases[worker_id]
        while self._releases[worker_id] == releases:
            claims = await self._answer(lambda: self.store.dequeue_many_rollouts(limit, worker_id, request_id))
            answered = limit <= 0 or request_id in self.store.state.requests
            if claims or answered or loop.time() >= deadline:
                return claims
            if not self.store.queued:
                await self._hunger(deadline - loop.time())
        self._feed()
        return []

    async def wait_for_queue(self, timeout: float) -> bool:
        """Wait until something is queued, at most ``timeout`` seconds; claims nothing."""
        if not self.store.queued:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._watching.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=timeout)
            finally:
                self._watching.discard(waiter)
        return bool(self.store.queued)

    async def wait_for_rollouts(self, timeout: float, rollout_ids: Sequence[str]) -> list[Rollout]:
        """Wait until all the rollouts have ended, at most ``timeout`` seconds; returns those that have."""
        self._check_known(rollout_ids)
        wait = _Wait(rollout_ids, {rollout.rollout_id for rollout in self._ended(rollout_ids)})
        for rollout_id in wait.missing:
            self._waits[rollout_id].add(wait)
        try:
            if wait.missing:
                await asyncio.wait([wait.done], timeout=timeout)
        finally:
            for rollout_id in wait.missing:
                self._waits[rollout_id].discard(wait)
                if not self._waits[rollout_id]:
                    del self._waits[rollout_id]
        return await self._answer(lambda: self._ended(rollout_ids))

    async def sql(self, query: str) -> pa.Table:
        """The answer of a query; worked out in a thread of its own."""
        from lightning_ray.store.sql import service_sql

        await self.durable()
        return await service_sql(self.store, query)

    async def tables(self, columns: list[str] | None) -> dict[str, pa.Table]:
        """The tables that SQL sees, for who merges them with those of other stores."""
        from lightning_ray.store.sql import service_tables

        await self.durable()
        return await service_tables(self.store, columns)

    async def compact(self) -> None:
        """Bring all that is stored into its long-term form."""
        storage = self.store.storage
        storage.begin_compaction()
        while (job := storage.compacting()) is not None:
            await asyncio.wait([asyncio.wrap_future(job)])
            storage.go_on()
        await self.durable()

    async def close(self) -> None:
        """End the watchdog, make all durable and let go of the folder."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        try:
            await self.durable()
        finally:
            self._sync_thread.shutdown()
            self.store.close()

    def _finish(self, finishes: Sequence[Ending], encoded: pa.Buffer | None) -> list[Rollout]:
        spans = None if encoded is None else decode_batch(encoded)
        return self.store.finish_many_attempts([(*finish,) for finish in finishes], spans, encoded)

    def _release(self, worker_id: str, reason: str) -> list[str]:
        """Take back what a dead worker was at, and end its waiting dequeues empty-handed."""
        self._releases[worker_id] += 1
        for waiter in self._hungry:
            _wake(waiter)
        return self.store.release_worker(worker_id, reason)

    async def _hunger(self, seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hungry[waiter] = None
        try:
            await asyncio.wait([waiter], timeout=seconds)
        except asyncio.CancelledError:
            self._feed()
            raise
        finally:
            self._hungry.pop(waiter, None)

    async def _answer(self, call: Callable[[], T]) -> T:
        try:
            answer = call()
        except LightningRayError:
            await self.durable()
            raise
        await self.durable()
        return answer

    async def _sync(self) -> None:
        records, job = self.store.records, self.store.sync_job()
        if job is not None:
            await asyncio.get_running_loop().run_in_executor(self._sync_thread, job)
        self._synced = max(self._synced, records)

    def _watch(self) -> None:
        if self._watchdog is None:
            self._watchdog = asyncio.ensure_future(self._tick_for_ever())

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for job in (self.store.tick, self.store.maintain):
                try:
                    await self._answer(job)
                except Exception:
                    _log.exception("the store's watchdog failed; it tries again in %s s", WATCH_SECONDS)

    def _observe(self, events: list[Event]) -> None:
        for event in events:
            if event.get("rollout_status") in TERMINAL_ROLLOUT:
                self._tell_end(event["rollout_id"])
            for rollout_id in event.get("rollout_ids", ()):
                self._tell_end(rollout_id)
        self._feed()

    def _tell_end(self, rollout_id: str) -> None:
        for wait in self._waits.get(rollout_id, ()):
            wait.ended(rollout_id)

    def _feed(self) -> None:
        """Wake as many waiting dequeues as there are rollouts for them."""
        if not self.store.queued:
            return
        for _ in range(min(self.store.queued, len(self._hungry))):
            _wake(self._hungry.popitem(last=False)[0])
        for waiter in self._watching:
            _wake(waiter)

    def _check_known(self, rollout_ids: Sequence[str]) -> None:
        unknown = [rollout_id for rollout_id in rollout_ids if rollout_id not in self.store.state.rollouts]
        if unknown:
            raise StoreError(f"the store has no rollouts {unknown[:5]} to wait for; enqueue them first")

    def _ended(self, rollout_ids: Sequence[str]) -> list[Rollout]:
        """Those of the rollouts that have ended, in order of the ids."""
        found = (self.store.get_rollout_by_id(rollout_id) for rollout_id in dict.fromkeys(rollout_ids))
        return [rollout for rollout in found if rollout is not None and rollout.status in TERMINAL_ROLLOUT]


class _Wait:
    """One caller's wait for some rollouts."""

    def __init__(self, rollout_ids: Sequence[str], ended: set[str]) -> None:
        self.missing = set(rollout_ids) - ended
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open = set(self.missing)

    def ended(self, rollout_id: str) -> None:
        self._open.discard(rollout_id)
        if not self._open:
            _wake(self.done)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_WAITING: dict[str, Callable[..., Awaitable[Any]]] = {
    "dequeue_many_rollouts": StoreService.dequeue,
    "wait_for_queue": StoreService.wait_for_queue,
    "wait_for_rollouts": StoreService.wait_for_rollouts,
}
"""Calls that may wait for something to happen, for as long as their ``timeout``."""

_LONG: dict[str, Callable[..., Awaitable[Any]]] = {
    "sql": StoreService.sql,
    "tables": StoreService.tables,
    "compact": StoreService.compact,
}
"""Calls that are worked out elsewhere than in the event loop."""
