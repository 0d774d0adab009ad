"""What a runner tells the store: ends and spans of attempts, those that come within a few milliseconds together.

Everything may be told twice: the store keeps a span once, and the first end of an attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from lightning_ray.errors import StoreError
from lightning_ray.store.base import Finish, Store
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.tracing.attempt import Row

BUNDLE_SECONDS, MOST_BUNDLE_SECONDS = 0.002, 0.02
BUNDLE_ENDS = 256


class UnstorableError(StoreError):
    """A span of an attempt cannot be stored; nothing of the call was."""


class _Ending(NamedTuple):
    finish: Finish
    rows: Sequence[Row]
    told: asyncio.Future[None]


class Reports:
    """Talks to one store; for one event loop. With over 256 ``attempts`` at once an end waits longer for others."""

    def __init__(self, store: Store, attempts: int = 1):
        self._store = store
        self._bundle_seconds = min(MOST_BUNDLE_SECONDS, BUNDLE_SECONDS * max(1.0, attempts / BUNDLE_ENDS))
        self._endings: list[_Ending] = []
        self._sending: asyncio.Task[None] | None = None

    async def append(self, rows: Sequence[Row]) -> None:
        """Store spans. Raises UnstorableError if one cannot be."""
        if rows:
            await self._store.append_spans(_batch(rows))

    async def end(self, finish: Finish, rows: Sequence[Row]) -> None:
        """End an attempt and store its last spans; returns when both are durable.

        Raises UnstorableError if a span cannot be stored: the attempt is not ended then.
        """
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._endings.append(_Ending(finish, rows, told))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        await told

    async def _send_all(self) -> None:
        try:
            while self._endings:
                await asyncio.sleep(self._bundle_seconds)
                endings, self._endings = self._endings[:BUNDLE_ENDS], self._endings[BUNDLE_ENDS:]
                await self._send(endings)
        finally:
            self._sending = None

    async def _send(self, endings: list[_Ending]) -> None:
        """Send ends as one, and one by one if one of them is refused."""
        try:
            rows = [row for ending in endings for row in ending.rows]
            await self._store.finish_many_attempts(
                [ending.finish for ending in endings], _batch(rows) if rows else None
            )
        except StoreError as error:
            if len(endings) == 1:
                _settle(endings[0].told, error)
                return
            await asyncio.gather(*(self._send([ending]) for ending in endings))
        except BaseException as error:
            for ending in endings:
                _settle(ending.told, error)
            if not isinstance(error, Exception):
                raise
        else:
            for ending in endings:
                _settle(ending.told)


def _settle(future: asyncio.Future[None], error: BaseException | None = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    elif isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)


def _batch(rows: Sequence[Row]) -> pa.RecordBatch:
    try:
        return spans_to_batch(rows)
    except StoreError as error:
        raise UnstorableError(str(error)) from error


def storable(rows: Sequence[Row]) -> list[Row]:
    """The spans without those that cannot be stored."""
    kept = []
    for row in rows:
        with contextlib.suppress(StoreError):
            spans_to_batch([row])
            kept.append(row)
    return kept
