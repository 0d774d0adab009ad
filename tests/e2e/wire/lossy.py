"""HTTP clients that lose the answer to their first try, so that an SDK on top sends it again."""

from __future__ import annotations

import asyncio
from typing import Literal

import httpx

IMPATIENCE = 0.4
"""Seconds that the first try waits."""


class LossyTransport(httpx.AsyncHTTPTransport):
    """``impatient`` gives the first try up amid sampling; ``lost`` gets its whole answer and loses it."""

    def __init__(self, fault: Literal["impatient", "lost"]):
        super().__init__()
        self.tries = 0
        self._fault = fault

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.tries += 1
        if self.tries > 1:
            return await super().handle_async_request(request)
        if self._fault == "lost":
            answer = await super().handle_async_request(request)
            await answer.aread()
            raise httpx.ReadError("the connection was lost", request=request)
        try:
            async with asyncio.timeout(IMPATIENCE):
                await super().handle_async_request(request)
        except TimeoutError:
            raise httpx.ReadTimeout("too slow", request=request) from None
        raise AssertionError("the first try was answered in time: ask for more tokens")
