"""A run that is asked to stop (SIGTERM, as of ``ray job stop``) saves a checkpoint first, if it is given the time.

It is heard while a step's rollouts are awaited: what is being trained and swapped comes to its end, what is being
played is given up. Asked for a second time, or past the deadline, the run is interrupted wherever it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning_ray.job_id import this_job

T = TypeVar("T")
WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray waits for a job that it stops, before it kills it; of the job's environment."""
JOB_SECONDS = 3.0
"""Where that says nothing."""
OTHER_SECONDS = 30.0
"""That others wait who send SIGTERM, as Kubernetes does."""
END_SECONDS = 12.0
"""Of it, for the run's end behind the checkpoint."""
QUEUEING_SECONDS = 2.0
"""For what is being queued to be noted: a checkpoint tells where the tasks go on."""

_handlers: list[Any] = []
"""What asyncio does at Ctrl-C, where that is ignored."""


class Stopped(Exception):
    """The run was asked to stop, and nothing is in the middle."""


class Stop:
    """Of one run; ``ask`` is for a signal's handler."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def ask(self) -> bool:
        """Ask; False if the run is to be interrupted instead."""
        seconds = seconds_given()
        if self._loop is None or self._asked.is_set() or seconds <= 0:
            return False
        self._asked.set()
        self._loop.call_soon_threadsafe(self._give, seconds)
        return True

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, it can be asked for."""
        self._loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            self._loop = None
            if self._deadline is not None:
                self._deadline.cancel()

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives. Raises Stopped, with the work given up, if it is asked for meanwhile, or was."""
        if self._asked.is_set():
            work.close()
            raise Stopped
        working, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({working}, timeout=QUEUEING_SECONDS)
            if not working.done():
                raise Stopped
            return working.result()
        finally:
            asked.cancel()
            working.cancel()
            await asyncio.gather(working, asked, return_exceptions=True)

    def _give(self, seconds: float) -> None:
        self._deadline = asyncio.get_running_loop().call_later(seconds, interrupt)


def run_interruptibly(work: Coroutine[Any, Any, T]) -> T:
    """As ``asyncio.run``, where Ctrl-C is ignored too, as it is in what a script put into the background: there
    ``interrupt`` does what it would do, and Ctrl-C nothing.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN or threading.current_thread() != threading.main_thread():
        return asyncio.run(work)

    async def ignoring() -> T:
        asyncios = signal.signal(signal.SIGINT, signal.SIG_IGN)
        _handlers.append(asyncios)
        return await work

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return asyncio.run(ignoring())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _handlers.clear()


def interrupt() -> None:
    """As Ctrl-C does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        handler = _handlers[-1] if _handlers else signal.default_int_handler
        handler(signal.SIGINT, None)
    else:
        signal.raise_signal(signal.SIGINT)


def seconds_given() -> float:
    """For a checkpoint, between the asking and the end."""
    given = os.environ.get(WAIT)
    if given is not None:
        return float(given) - END_SECONDS
    return (OTHER_SECONDS if this_job() is None else JOB_SECONDS) - END_SECONDS


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Who handles SIGTERM before Ray is started, within, does so behind it: Ray would have it end the process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stoppable(ask: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """SIGTERM (a stopped job) ends a run as Ctrl-C does, unless the run takes it upon itself when it is asked."""

    def stop(*_: Any) -> None:
        if not ask():
            interrupt()

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: the owner of the signals decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
