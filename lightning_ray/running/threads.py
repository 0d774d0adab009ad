"""Agents that are not async: each attempt in a thread of its own, which is given up with it.

Python cannot end a thread. One that is given up has an exception raised in it, which ends Python code; what it waits
for in C goes on, and the thread is stuck until that returns. Stuck threads cost their runner, not the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

STUCK_SECONDS = 5.0
"""After being given up, a thread that is still there is stuck."""


class GivenUp(BaseException):
    """Raised in a thread whose attempt has ended."""


class _Work:
    """A call in a thread."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], name: str):
        self._function, self._arguments = function, arguments
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()
        self.given_up_at: float | None = None
        self._lock = threading.Lock()
        self.is_over = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        result: Any = None
        failure: BaseException | None = None
        with contextlib.suppress(GivenUp):  # one that comes when the function has just returned
            try:
                result = self._function(*self._arguments)
            except BaseException as error:
                failure = error
            with self._lock:
                self.is_over = True
        self.is_over = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._settle, result, failure)

    def _settle(self, result: Any, failure: BaseException | None) -> None:
        if self.result.done():
            return
        if failure is not None:
            self.result.set_exception(failure)
        else:
            self.result.set_result(result)

    def give_up(self) -> None:
        """Raise GivenUp in the thread; again if it went on."""
        self.given_up_at = self.given_up_at or time.monotonic()
        with self._lock:
            if not self.is_over and self._thread.ident is not None:
                thread = ctypes.c_ulong(self._thread.ident)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(GivenUp))


class AgentThreads:
    """Calls functions in threads, and keeps an eye on those given up."""

    def __init__(self) -> None:
        self._given_up: set[_Work] = set()

    async def call(self, function: Callable[..., Any], *arguments: Any, name: str = "agent") -> Any:
        """What the function returns or raises. When this is cancelled, the thread is given up."""
        work = _Work(function, arguments, name)
        try:
            return await work.result
        finally:
            if not work.is_over:
                work.give_up()
                self._given_up.add(work)

    def stuck(self) -> int:
        """How many threads are stuck; each is told once more that it was given up."""
        self._given_up = {work for work in self._given_up if not work.is_over}
        for work in self._given_up:
            work.give_up()
        now = time.monotonic()
        return sum(now - (work.given_up_at or now) > STUCK_SECONDS for work in self._given_up)
