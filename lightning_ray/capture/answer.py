"""An answer on its way out. Invariant: a client that was answered in full finds its call in the span store.

The rows are on their way as soon as the engine has ended, while the app still builds its answer, and durable before the
first byte that follows the end of sampling is released.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lightning_ray.capture.call import CapturedRequest
from lightning_ray.capture.dialects import Dialect
from lightning_ray.capture.refusal import refuse
from lightning_ray.errors import StoreError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Append = Callable[[list[dict[str, Any]]], Awaitable[None]]

VERSION_HEADER = b"x-lightning-weight-version"
ON_ITS_WAY = "on its way to the engine"
"""The stage of a call that the app has neither brought to the engine nor begun to answer."""

logger = logging.getLogger(__name__)


class Answer:
    """Lets an answer go out, its call stored first; a call that cannot be stored is answered with an error.

    ``version`` tells the weight version that serves now, for the headers of answers that go out before sampling ends.
    """

    def __init__(
        self, request: CapturedRequest, dialect: Dialect, append: Append, send: Send, version: Callable[[], int | None]
    ):
        self.delivered = False
        """Whether the last byte went out, and somebody was there."""
        self.failed = False
        """Whether it is an error's."""
        self._request = request
        self._dialect = dialect
        self._append = append
        self._send = send
        self._version = version
        self._rows: list[dict[str, Any]] = []
        """Rows that are not known to be durable; resending one stores it once, by its span id."""
        self._storing: asyncio.Task[None] | None = None
        self._came = time.monotonic()
        self._began = self._ended = False
        self._refused = False
        self._left = False
        request.ended = self._begin_storing

    @property
    def unstored(self) -> bool:
        """Whether there are rows that are not known to be durable."""
        return bool(self._rows)

    @property
    def stage(self) -> str:
        """How far the call has come."""
        if not (self._began or self._ended or self._request.at_engine):
            return ON_ITS_WAY
        if self._request.running:
            return "in the engine"
        return "being stored" if self.unstored else "going out"

    @property
    def seconds(self) -> float:
        """For how long the call has been at work."""
        return time.monotonic() - self._came

    @property
    def progress(self) -> dict[str, Any]:
        """Whose call it is, how far it has come, and in how many seconds."""
        return {"attempt": self._request.caller.attempt_id, "stage": self.stage, "seconds": round(self.seconds, 1)}

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Store these with the call's own."""
        self._rows += rows

    def hung_up(self) -> None:
        """The app was told that the client is gone: what it sends from here on, nobody gets."""
        self._left = not self.delivered

    async def release(self, message: Message) -> None:
        """Send a message of the app's."""
        if self._refused:
            return
        if self._request.complete:
            try:
                await self._store()
            except Exception as error:
                logger.exception("a call of attempt %s could not be stored", self._request.caller.attempt_id)
                self._refused = True
                if self._began:
                    raise
                # 503 says that the infrastructure failed; the agent is not to blame for that.
                status = 400 if isinstance(error, StoreError) else 503
                await refuse(self._send, self._dialect, status, f"the call could not be stored: {error}")
                return
        if message["type"] == "http.response.start":
            self.failed = message["status"] >= 400
            message = self._with_version(message)
        self._began = True
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.delivered = not self._left

    def _with_version(self, message: Message) -> Message:
        version = self._request.versions() or self._version()
        if version is None:
            return message
        header = (VERSION_HEADER, str(version).encode())
        return {**message, "headers": [*message.get("headers", ()), header]}

    async def end(self) -> None:
        """The app is done, or the client hung up: then what was sampled until now is stored."""
        self._ended = True
        self._request.hung_up |= not self.delivered
        self._request.settle()
        if not self._refused:
            await self._store()

    def _begin_storing(self) -> None:
        self._rows += self._request.take_spans()
        if self._rows and self._storing is None:
            self._storing = asyncio.ensure_future(self._store_now(list(self._rows)))

    async def _store_now(self, rows: list[dict[str, Any]]) -> None:
        await self._append(rows)
        del self._rows[: len(rows)]

    async def _store(self) -> None:
        self._begin_storing()
        while self._storing is not None:
            storing = self._storing
            try:
                await asyncio.shield(storing)
            finally:
                if storing.done():
                    self._storing = None
            self._begin_storing()
