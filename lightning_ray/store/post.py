"""Calls to the store's actor, bundled: those that are made while a message is under way share the next.

Ray takes most of a millisecond for a message, whatever it carries, and the store takes far less for a call. A
call alone waits for nothing. Small messages take the direct line, if there is one; what a broken line lost goes through
Ray. Each call has its own answer or failure; resending is the client's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

import pyarrow as pa

from lightning_ray.store.line import Answer, Dialer, LineLost

_SLOW_SECONDS = 1.0
"""A message that is under way for longer does not hold up later ones."""
_MESSAGE_CALLS = 128
_MESSAGE_BYTES = 8 * 2**20

_LINE_BYTES = 2**18
"""Larger messages are better off in Ray's object store."""


class Call:
    """One call as it is sent, and its answer to come."""

    def __init__(self, message: bytes, buffers: list[pa.Buffer], timeout: float | None) -> None:
        self.message, self.buffers, self.timeout = message, buffers, timeout
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.size = len(message) + sum(buffer.size for buffer in buffers)


class Post:
    """Sends the calls of one event loop: those that come while a message is under way share the next."""

    def __init__(self, handle: Any, line: bool = True) -> None:
        self._handle = handle
        self._dialer = Dialer(handle) if line else None
        self._waiting: deque[Call] = deque()
        self._is_busy = False
        """Whether a message is under way that later calls wait for: Ray takes long for each, whatever it carries."""
        self._is_due = False
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, call: Call, apart: bool) -> asyncio.Future[Answer]:
        """Have the call sent; ``apart`` from all others if its answer may take long. Such a call is broken off in
        the store too when its answer is given up.
        """
        if apart:
            self._start(self._deliver([call], apart))
        else:
            self._waiting.append(call)
            self._wake()
        return call.answer

    def _send_waiting(self) -> None:
        """Send what waits, as one message, unless another is under way."""
        self._is_due = False
        if not self._is_busy and (calls := self._take()):
            self._is_busy = True
            self._start(self._deliver_shared(calls))

    def _take(self) -> list[Call]:
        calls: list[Call] = []
        size = 0
        while self._waiting and len(calls) < _MESSAGE_CALLS and size < _MESSAGE_BYTES:
            call = self._waiting.popleft()
            if not call.answer.done():
                calls.append(call)
                size += call.size
        return calls

    async def _deliver_shared(self, calls: list[Call]) -> None:
        is_free = False

        def free() -> None:
            nonlocal is_free
            if not is_free:
                is_free, self._is_busy = True, False
                self._wake()

        slow = asyncio.get_running_loop().call_later(_SLOW_SECONDS, free)
        try:
            await self._deliver(calls)
        finally:
            slow.cancel()
            free()

    def _wake(self) -> None:
        """Have waiting calls sent when this turn of the loop is over: all that are made in it go together."""
        if not self._is_due and self._waiting:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._send_waiting)

    async def _deliver(self, calls: list[Call], apart: bool = False) -> None:
        """One message and its answer. Failures are those of all its calls."""
        envelopes = [(call.message, call.timeout, len(call.buffers)) for call in calls]
        buffers = [buffer for call in calls for buffer in call.buffers]
        try:
            answers = None if apart else await self._send_by_line(envelopes, buffers, calls)
            if answers is None:
                answers = await self._send(envelopes, buffers, calls)
        except asyncio.CancelledError:
            for call in calls:
                call.answer.cancel()
            raise
        except Exception as error:
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(error)
        else:
            for call, answer in zip(calls, answers, strict=True):
                if not call.answer.done():
                    call.answer.set_result(answer)

    async def _send_by_line(
        self, envelopes: list[Any], buffers: list[pa.Buffer], calls: list[Call]
    ) -> list[Answer] | None:
        """The answers, or None if the message must go through Ray."""
        line = None
        if self._dialer is not None and sum(call.size for call in calls) <= _LINE_BYTES:
            line = self._dialer.line()
        if line is None:
            return None
        try:
            return await line.send(envelopes, buffers)
        except LineLost:
            return None

    def _send(self, envelopes: list[Any], buffers: list[pa.Buffer], calls: list[Call]) -> Any:
        message = self._handle.calls.remote(envelopes, buffers)
        if len(calls) == 1 and calls[0].timeout:
            calls[0].answer.add_done_callback(lambda answer: _break_off(message) if answer.cancelled() else None)
        return message

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _break_off(message: Any) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.cancel(message)
