"""Things of which each event loop has one, made at first use: Ray runs an async actor's loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """Holds open files."""

    @property
    def alive(self) -> bool:
        """Whether it can still be used."""

    def close(self) -> None:
        """Close its files; needs no running loop."""


T = TypeVar("T", bound=Closable)


class PerLoop(Generic[T]):
    """``here()`` gives the running loop's own. Those of loops that were closed are closed at the next call."""

    def __init__(self, make: Callable[[], T]):
        self._make = make
        self._made: dict[asyncio.AbstractEventLoop, T] = {}
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def here(self) -> T:
        """The running loop's own."""
        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._made if other.is_closed()]:
                self._made.pop(other).close()
            if (made := self._made.get(loop)) is not None and made.alive:
                return made
            made = self._made[loop] = self._make()
            return made

    def _forget(self) -> None:
        for made in self._made.values():
            made.close()
        self._made.clear()
        self._lock = threading.Lock()
