"""How long the parts of a swap take."""

from __future__ import annotations

import time


class Phases:
    """Seconds by name, in order; every moment belongs to one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """What passed since the last end, or the start, was this."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
