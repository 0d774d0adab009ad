"""How much is asked of an upstream: calls at once, and requests and tokens a minute. Who comes first goes first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from lightning_ray.relay.settings import Upstream

BURST_SECONDS = 5.0
"""Of a minute's allowance, what may be used at once after a pause; at least one request."""


class TooBusy(Exception):
    """A call waited for its place for as long as it may."""


class Bucket:
    """Fills at a steady rate up to its capacity. ``give`` may overdraw it: takers then wait for longer."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._rate = per_minute / 60
        self._capacity = max(1.0, self._rate * BURST_SECONDS)
        self._clock = clock
        self._level = self._capacity
        self._filled = clock()
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> None:
        """Wait until there is so much, and take it; more than the capacity counts when it is full."""
        async with self._turn:
            while (lacking := min(amount, self._capacity) - self._fill()) > 1e-9:
                await asyncio.sleep(lacking / self._rate)
            self._level -= amount

    def give(self, amount: float) -> None:
        """Put back what was taken and not used; negative if more was used."""
        self._level = min(self._capacity, self._fill() + amount)

    def _fill(self) -> float:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled) * self._rate)
        self._filled = now
        return self._level


class Limiter:
    """The limits of one upstream."""

    def __init__(self, upstream: Upstream):
        self.running = 0
        self.waiting = 0
        self._slots = asyncio.Semaphore(upstream.max_concurrent)
        self._requests = upstream.requests_per_minute and Bucket(upstream.requests_per_minute)
        self._tokens = upstream.tokens_per_minute and Bucket(upstream.tokens_per_minute)
        self._wait_seconds = upstream.wait_seconds

    @asynccontextmanager
    async def slot(self, tokens: int, used: Callable[[], int | None]) -> AsyncIterator[None]:
        """A place for a call that is held to take so many tokens, until ``used`` tells how many it took.

        Raises TooBusy if it cannot begin in time.
        """
        await self._begin(tokens)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._slots.release()
            if self._tokens and (took := used()) is not None:
                self._tokens.give(tokens - took)

    async def request(self) -> None:
        """Wait until one more request may be sent; retries are requests too. Raises TooBusy."""
        if self._requests:
            async with self._waiting():
                await self._requests.take(1)

    async def _begin(self, tokens: int) -> None:
        async with self._waiting():
            await self._slots.acquire()
            try:
                if self._tokens:
                    await self._tokens.take(tokens)
            except BaseException:
                self._slots.release()
                raise

    @asynccontextmanager
    async def _waiting(self) -> AsyncIterator[None]:
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_seconds):
                yield
        except TimeoutError:
            raise TooBusy from None
        finally:
            self.waiting -= 1
