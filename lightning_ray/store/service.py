"""The store as concurrent callers see it: waits that end, group commits, and a watchdog.

Wraps one SpanStore in one event loop. An answer is given only when all it tells is durable: callers that
arrive while a sync is under way share the next one. Nothing polls: a dequeue waits for the queue, a wait for
rollouts waits for their ends. Shared by the actor and the client without Ray; how calls get here is theirs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from lightning_ray.errors import LightningRayError, StoreError
from lightning_ray.store.core import SpanStore
from lightning_ray.store.log import Event
from lightning_ray.store.schema import decode_batch
from lightning_ray.types import TERMINAL_ROLLOUT, AttemptedRollout, Rollout

T = TypeVar("T")
_WATCH_SECONDS = 1.0
_PLAIN_CALLS = frozenset(
    {
        "enqueue_many_rollouts",
        "update_rollout",
        "heartbeat",
        "query_rollouts",
        "query_attempts",
        "query_spans",
        "update_resources",
        "get_resources_by_id",
        "get_latest_resources",
        "statistics",
    }
)
_log = logging.getLogger(__name__)


class StoreService:
    """Async calls on a SpanStore; all in one event loop."""

    def __init__(self, store: SpanStore) -> None:
        store.defer_sync, store.observe = True, self._observe
        self.store = store
        self._synced = store.records
        self._syncing: asyncio.Task[None] | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._hungry: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._waits: defaultdict[str, set[_Wait]] = defaultdict(set)
        self._releases: Counter[str] = Counter()

    async def call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """One call as clients send it: spans as ``encode_batch`` gives them, all else as it is."""
        if name == "dequeue_many_rollouts":
            return await self.dequeue(timeout or 0.0, *args)
        if name == "wait_for_rollouts":
            return await self.wait_for_rollouts(timeout or 0.0, *args)
        if name == "release_worker":
            return await self.release_worker(*args)
        if name == "add_many_spans":
            return await self._answer(lambda: self.store.add_many_spans(decode_batch(args[0]), args[0]))
        if name == "finish_attempt":
            return await self._answer(lambda: self._finish(*args))
        if name not in _PLAIN_CALLS:
            raise StoreError(f"the store has no call {name!r}")
        return await self._answer(lambda: getattr(self.store, name)(*args))

    async def dequeue(self, timeout: float, limit: int, worker_id: str, request_id: str) -> list[AttemptedRollout]:
        """Lease rollouts; with an empty queue wait up to ``timeout`` seconds, or for the worker's release."""
        loop = asyncio.get_running_loop()
        deadline, releases = loop.time() + timeout, self._releases[worker_id]
        while self._releases[worker_id] == releases:
            claims = await self._answer(lambda: self.store.dequeue_many_rollouts(limit, worker_id, request_id))
            if claims or loop.time() >= deadline:
                return claims
            await self._hunger(deadline - loop.time())
        self._feed()
        return []

    async def release_worker(self, worker_id: str, reason: str) -> list[str]:
        """Take back what a dead worker was at, and end its waiting dequeues empty-handed."""
        self._releases[worker_id] += 1
        for waiter in self._hungry:
            _wake(waiter)
        return await self._answer(lambda: self.store.release_worker(worker_id, reason))

    async def wait_for_rollouts(self, timeout: float, rollout_ids: Sequence[str]) -> list[Rollout]:
        """Wait until all the rollouts have ended, at most ``timeout`` seconds; returns those that have."""
        self._watch()
        for rollout_id in rollout_ids:
            self.store.query_attempts(rollout_id)
        wait = _Wait(rollout_ids, self._ended(rollout_ids))
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
        return await self._answer(lambda: self.store.query_rollouts(sorted(TERMINAL_ROLLOUT), rollout_ids))

    async def close(self) -> None:
        """End the watchdog, make all durable and let go of the folder."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        await self._durable()
        self.store.close()

    def _finish(
        self,
        rollout_id: str,
        attempt_id: str,
        status: str,
        encoded: pa.Buffer | None,
        metadata: dict[str, Any] | None,
    ) -> Rollout:
        spans = None if encoded is None else decode_batch(encoded)
        return self.store.finish_attempt(rollout_id, attempt_id, status, spans, metadata, encoded)

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
        self._watch()
        try:
            answer = call()
        except LightningRayError:
            await self._durable()
            raise
        await self._durable()
        return answer

    async def _durable(self) -> None:
        wanted = self.store.records
        while self._synced < wanted:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.ensure_future(self._sync())
            await asyncio.shield(self._syncing)

    async def _sync(self) -> None:
        records, job = self.store.records, self.store.sync_job()
        if job is not None:
            await asyncio.to_thread(job)
        self._synced = max(self._synced, records)

    def _watch(self) -> None:
        if self._watchdog is None:
            self._watchdog = asyncio.ensure_future(self._tick_for_ever())

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                await self._answer(self.store.tick)
            except Exception:
                _log.exception("the store's watchdog failed; it tries again in %s s", _WATCH_SECONDS)

    def _observe(self, events: list[Event]) -> None:
        for event in events:
            if event.get("rollout_status") in TERMINAL_ROLLOUT:
                for wait in self._waits.get(event["rollout_id"], ()):
                    wait.ended(event["rollout_id"])
        self._feed()

    def _feed(self) -> None:
        for _ in range(min(self.store.queued, len(self._hungry))):
            _wake(self._hungry.popitem(last=False)[0])

    def _ended(self, rollout_ids: Sequence[str]) -> set[str]:
        return {rollout.rollout_id for rollout in self.store.query_rollouts(sorted(TERMINAL_ROLLOUT), rollout_ids)}


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
