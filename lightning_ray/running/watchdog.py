"""What goes on when the agent blocks the event loop: a thread that keeps the leases, and ends the process in time.

An async agent that computes, or waits without ``await``, holds up every other attempt of its runner, its heartbeats
and its own timeout. For a while that is only slow: the watchdog sends the heartbeats. When it lasts, or an attempt is
past its time, the process ends; the attempt that blocks is told to have timed out, the others are played elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from lightning_ray.running.play import Play
from lightning_ray.running.reports import storable
from lightning_ray.store.base import Finish, Store
from lightning_ray.store.schema import spans_to_batch

CHECK_SECONDS = 1.0
HEARTBEAT_AFTER = 4.0
"""Seconds of silence after which the watchdog sends the heartbeats."""
BLOCKED_SECONDS = 60.0
OVERDUE_SECONDS = 5.0
"""Of silence, and past an attempt's timeout, when it is not waited for any longer."""
CALL_SECONDS = 10.0
SHOWN_FRAMES = 4
EXIT_CODE = 75


class Watchdog:
    """Watches the running loop from a thread of its own."""

    def __init__(self, store: Store, worker_id: str, playing: Callable[[], Sequence[Play]], end: Callable[[], Any]):
        """``end`` ends the process."""
        self._store = store
        self._worker_id = worker_id
        self._playing = playing
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._seen = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _see(self) -> None:
        self._seen = time.monotonic()

    def _watch(self) -> None:
        calls = asyncio.new_event_loop()
        while not self._closed.wait(CHECK_SECONDS):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._see)
            silent = time.monotonic() - self._seen
            if silent > HEARTBEAT_AFTER:
                self._call(calls, self._store.heartbeat(self._worker_id, [play.key for play in self._playing()]))
            if silent > BLOCKED_SECONDS or (silent > OVERDUE_SECONDS and self._is_overdue()):
                self._give_up(calls, silent)
        calls.close()

    def _call(self, loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, Any]) -> None:
        with contextlib.suppress(Exception):
            loop.run_until_complete(asyncio.wait_for(call, CALL_SECONDS))

    def _is_overdue(self) -> bool:
        late = time.monotonic() - OVERDUE_SECONDS
        return any(play.deadline is not None and play.deadline < late for play in self._playing())

    def _give_up(self, calls: asyncio.AbstractEventLoop, silent: float) -> None:
        frames = traceback.extract_stack(sys._current_frames()[self._thread_id])[-SHOWN_FRAMES:]
        where = " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
        reason = f"the event loop was blocked for {silent:.0f} s: {where}"
        plays = list(self._playing())
        rows = storable([row for play in plays for row in play.take()])
        if rows:
            self._call(calls, self._store.append_spans(spans_to_batch(rows)))
        if (task := asyncio.current_task(self._loop)) is not None:
            for play in plays:
                if play.key[1] == task.get_name():
                    finish = Finish(*play.key, "timeout", {"reason": reason})
                    self._call(calls, self._store.finish_many_attempts([finish]))
        print(reason, file=sys.stderr, flush=True)
        self._end()


def exit_now() -> None:
    """End this process, whatever it is doing."""
    os._exit(EXIT_CODE)
