"""A client process of the store benchmark: prepares spans, then sends them as fast as the store answers.

Runs as a Ray actor with a StoreClient of its own. Windows are given by wall-clock time, so that several
clients measure the same ones. What counts in a window is what was answered in it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import count
from typing import Any

import pyarrow as pa

from benchmarks.spans import Key, SpanMaker, renamed
from lightning_ray.store import Store, StoreClient, spans_to_batch
from lightning_ray.store.base import Finish
from lightning_ray.types import EnqueueRolloutRequest

ROLLOUT_SPANS = 10
_MANY = 256
"""Rollouts enqueued, leased or finished in one call outside of the measured windows."""


class Windows:
    """Counts what happens in each of some windows of wall-clock time that follow each other."""

    def __init__(self, start: float, seconds: float, number: int) -> None:
        self._start, self._seconds = start, seconds
        self.counts = [0] * number

    @property
    def over(self) -> bool:
        """Whether the last window has ended."""
        return time.time() >= self._start + self._seconds * len(self.counts)

    def add(self, amount: int) -> None:
        """Count now; before the first window and after the last nothing is counted."""
        index = int((time.time() - self._start) // self._seconds)
        if 0 <= index < len(self.counts):
            self.counts[index] += amount


class Client:
    """One client process; ``number`` tells it from the others."""

    def __init__(self, handle: Any, number: int) -> None:
        self._store: Store = StoreClient(handle)
        self._maker = SpanMaker(1000 + number)
        self._name = f"client-{number}"
        self._keys: list[Key] = []
        self._pool: list[pa.RecordBatch] = []

    async def prepare(self, batches: int, rows: int, rollouts: int) -> float:
        """Lease rollouts and build the batches that ``ingest`` sends, of contents that never repeat; returns
        the seconds it takes to build a span.
        """
        self._keys = await self._lease(rollouts)
        spans = [[self._maker.span(("", "")) for _ in range(rows)] for _ in range(batches)]
        began = time.perf_counter()
        self._pool = [spans_to_batch(some) for some in spans]
        return (time.perf_counter() - began) / (batches * rows)

    async def ingest(self, windows: Windows, in_flight: int) -> list[int]:
        """Append the prepared batches, over and over under fresh ids, until the windows are over; returns the
        spans answered in each window.
        """
        batches, rows = count(), count()

        async def send() -> None:
            while not windows.over:
                batch = self._pool[next(batches) % len(self._pool)]
                numbers = [next(rows) for _ in range(batch.num_rows)]
                keys = [self._keys[number // ROLLOUT_SPANS % len(self._keys)] for number in numbers]
                await self._store.append_spans(renamed(batch, keys, [f"{number:016x}" for number in numbers]))
                windows.add(batch.num_rows)

        await asyncio.gather(*(send() for _ in range(in_flight)))
        return windows.counts

    async def end(self) -> None:
        """End the rollouts of ``prepare``."""
        await self._finish(self._keys)

    async def cycles(self, windows: Windows, rollouts: int, loops: int) -> list[int]:
        """Enqueue, lease and finish ``rollouts`` at a time until the windows are over; returns the rollouts
        finished in each window.
        """

        async def cycle() -> None:
            while not windows.over:
                await self._store.enqueue_many_rollouts(_requests(rollouts))
                claims = await self._store.dequeue_many_rollouts(limit=rollouts, worker_id=self._name, timeout=1.0)
                await self._finish([(claim.rollout_id, claim.attempt.attempt_id) for claim in claims])
                windows.add(len(claims))

        await asyncio.gather(*(cycle() for _ in range(loops)))
        return windows.counts

    async def load(self, spans: int, rows: int, in_flight: int) -> tuple[list[str], int]:
        """Store spans of fresh rollouts, all built and done on the spot: enqueue, lease, append, finish.

        Returns the rollouts' ids and the spans' bytes as Arrow.
        """
        keys = await self._lease(spans // ROLLOUT_SPANS)
        rest = deque(key for key in keys for _ in range(ROLLOUT_SPANS))
        nbytes = 0

        async def send() -> None:
            nonlocal nbytes
            while rest:
                mine = [rest.popleft() for _ in range(min(rows, len(rest)))]
                batch = spans_to_batch([self._maker.span(key) for key in mine])
                nbytes += batch.nbytes
                await self._store.append_spans(batch)

        await asyncio.gather(*(send() for _ in range(in_flight)))
        await self._finish(keys)
        return [rollout_id for rollout_id, _ in keys], nbytes

    async def _lease(self, rollouts: int) -> list[Key]:
        keys: list[Key] = []
        while len(keys) < rollouts:
            wanted = min(_MANY, rollouts - len(keys))
            await self._store.enqueue_many_rollouts(_requests(wanted))
            claims = await self._store.dequeue_many_rollouts(limit=wanted, worker_id=self._name, timeout=1.0)
            keys += [(claim.rollout_id, claim.attempt.attempt_id) for claim in claims]
        return keys

    async def _finish(self, keys: list[Key]) -> None:
        for first in range(0, len(keys), _MANY):
            await self._store.finish_many_attempts(
                [Finish(rollout_id, attempt_id, "succeeded") for rollout_id, attempt_id in keys[first : first + _MANY]]
            )


def _requests(rollouts: int) -> list[EnqueueRolloutRequest]:
    question = "How many of the customers who ordered in May have ordered again by the end of the year?"
    return [
        EnqueueRolloutRequest(input={"question": question, "database": "orders", "number": number}, mode="train")
        for number in range(rollouts)
    ]
