"""A clock that knows what a loop is doing: seconds by phase, whose shares add up to 1.

Time counts for the innermost open phase, and for ``other`` outside of all. One task at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from lightning_ray.waiting import waiting

OTHER = "other"


class PhaseClock:
    """Runs from when it is made. ``now`` tells seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._since = now()
        self._open = [OTHER]
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent within is the phase's, however it ends."""
        self._charge()
        self._open.append(name)
        try:
            with waiting(f"the phase {name!r}"):
                yield
        finally:
            self._charge()
            self._open.pop()

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the lap before, or since the clock was made."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _charge(self) -> None:
        now = self._now()
        name = self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each phase's part of the whole time; nothing if no time has passed."""
    whole = sum(seconds.values())
    return {name: spent / whole for name, spent in seconds.items()} if whole > 0 else {}
