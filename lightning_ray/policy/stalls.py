"""A replica that hangs: it has calls, and nothing moves. Nothing in it is dead, so nobody else would notice."""

from __future__ import annotations

import time

from lightning_ray.policy.engine_load import EngineLoad


class StallWatch:
    """Is asked every few seconds whether the replica hangs, which it does after ``seconds`` without any progress."""

    def __init__(self, load: EngineLoad, seconds: float):
        self._load = load
        self._seconds = seconds
        self._since: float | None = None
        """When the engine was first seen with work that it has not got on with."""

    def check(self, at_work: bool, swapping: bool, held_up: float) -> None:
        """Raises RuntimeError if it hangs.

        ``at_work`` tells whether the engine has requests, ``swapping`` whether it is not to work on them now, and
        ``held_up`` for how many seconds calls have been on their way to it without one that arrived.
        """
        now = time.monotonic()
        if swapping or (self._since is not None and self._load.got_on >= self._since):
            self._since = None
        if at_work and not swapping and self._since is None:
            self._since = now
        # Clients that give up and call again leave an engine that hangs without requests for a moment.
        stalled = now - self._since if at_work and self._since is not None else 0.0
        for what, seconds in (("its engine has not got on with its calls", stalled), ("no call got to it", held_up)):
            if seconds > self._seconds:
                raise RuntimeError(
                    f"the replica hangs: {what} for {seconds:.0f} s; if that may take so long, allow more by "
                    "engine.stall_seconds"
                )
