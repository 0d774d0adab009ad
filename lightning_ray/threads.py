"""Blocking work beside an event loop that may be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.02
_asking: set[object] = set()


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call a blocking function in a thread of its own.

    Unlike with ``asyncio.to_thread``, nobody waits for the thread once the caller is cancelled, nor does the process
    at its end: an interrupted run must not sit out a model being made or a deployment coming up.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, failure = None, None
        try:
            result = function(*arguments)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, daemon=True).start()
    return await future


async def ask_ray(function: Callable[..., T], *arguments: Any) -> T:
    """As ``in_thread``, of a function that calls Ray: ``until_nobody_asks`` waits for it."""
    asking = object()
    _asking.add(asking)

    def work() -> T:
        try:
            return function(*arguments)
        finally:
            _asking.discard(asking)

    return await in_thread(work)


async def until_nobody_asks(seconds: float) -> None:
    """Wait until no thread calls Ray, at most ``seconds``.

    Ray must not be shut down under one: a call that is under way then ends the whole process, with exit code 1 and
    without a word.
    """
    deadline = time.monotonic() + seconds
    while _asking and time.monotonic() < deadline:
        await asyncio.sleep(LOOK_SECONDS)
