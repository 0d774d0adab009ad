"""Appends of many calls as one: rows that come while an append is under way share the next.

An append costs about the same whatever it carries. So where many calls are at work, rows wait a few milliseconds for
those of others; a call among few waits for nothing. Each call's rows are durable when its own ``append`` returns, and a
call whose rows are refused is told so alone: an append of several that fails is done again for each, which stores no
row twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

Rows = list[dict[str, Any]]
ROWS_AT_ONCE = 256
MANY_CALLS = 8
"""At work, from which rows wait for others."""
PATIENCE_SECONDS = 0.012
SHARE = 4
"""Rows wait no longer once one of so many calls at work has come to its end."""


class SharedAppend:
    """Stands for ``append``, which stores rows and returns when they are durable. Of one event loop.

    ``at_work`` tells how many calls are at work, those that wait here included.
    """

    def __init__(self, append: Callable[[Rows], Awaitable[None]], at_work: Callable[[], int] = lambda: 0):
        self._append = append
        self._at_work = at_work
        self._enough: asyncio.Future[None] | None = None
        """What is waited on for the rows of others."""
        self._wanted = 0
        self._waiting: list[tuple[Rows, asyncio.Future[None]]] = []
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, rows: Rows) -> None:
        """Store rows; returns when they are durable."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, stored))
        if self._enough is not None and len(self._waiting) >= self._wanted:
            _fulfil(self._enough)
        if self._working is None:
            self._working = asyncio.ensure_future(self._work())
        await stored

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._wait_for_others()
                await self._store(self._take())
        finally:
            self._working = None

    async def _wait_for_others(self) -> None:
        self._wanted = self._at_work() // SHARE
        if len(self._waiting) >= self._wanted or self._wanted * SHARE < MANY_CALLS:
            return
        loop = asyncio.get_running_loop()
        self._enough = loop.create_future()
        patience = loop.call_later(PATIENCE_SECONDS, _fulfil, self._enough)
        try:
            await self._enough
        finally:
            patience.cancel()
            self._enough = None

    def _take(self) -> list[tuple[Rows, asyncio.Future[None]]]:
        count = rows = 0
        for some, _ in self._waiting:
            rows += len(some)
            if count and rows > ROWS_AT_ONCE:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def _store(self, taken: list[tuple[Rows, asyncio.Future[None]]]) -> None:
        try:
            await self._append([row for rows, _ in taken for row in rows])
        except Exception as error:
            if len(taken) > 1:
                await asyncio.gather(*(self._store([each]) for each in taken))
            elif not taken[0][1].done():
                taken[0][1].set_exception(error)
        except BaseException:
            for _, stored in taken:
                stored.cancel()
            raise
        else:
            for _, stored in taken:
                if not stored.done():
                    stored.set_result(None)


def _fulfil(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
