"""HTTP clients that lose the answer to their first try, so that an SDK on top sends it again."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any, Literal

IMPATIENCE = 0.6
"""Seconds that an impatient first try waits."""
Fault = Literal["impatient", "lost"]


def lossy(http: ModuleType, fault: Fault) -> Any:
    """A transport of ``http`` (httpx or httpx2) whose first try is given up amid sampling (``impatient``), or whose
    answer comes in full and is lost; ``tries`` counts.
    """

    class Transport(http.AsyncHTTPTransport):  # type: ignore[name-defined]
        tries = 0

        async def handle_async_request(self, request: Any) -> Any:
            self.tries += 1
            if self.tries > 1:
                return await super().handle_async_request(request)
            if fault == "lost":
                await (await super().handle_async_request(request)).aread()
                raise http.ReadError("the connection was lost", request=request)
            try:
                async with asyncio.timeout(IMPATIENCE):
                    await super().handle_async_request(request)
            except TimeoutError:
                raise http.ReadTimeout("too slow", request=request) from None
            raise AssertionError("the first try was answered in time: ask for more tokens")

    return Transport()
