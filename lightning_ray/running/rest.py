"""When a runner begins nothing: while attempt after attempt fails by no fault of its agent, as when the door to the
policy is being started anew.

A rollout has only so many chances at the infrastructure, and would use them up within seconds if it were played again
at once.
"""

from __future__ import annotations

import time

IN_A_ROW = 3
"""Failures, without a better end between them, after which the runner rests."""
FIRST_SECONDS, LONGEST_SECONDS = 1.0, 8.0
"""Each rest is twice as long as the one before."""


class Rest:
    """How long there is to wait before the next attempt."""

    def __init__(self) -> None:
        self._failures = 0
        self._length = 0.0
        self._until = 0.0

    @property
    def seconds(self) -> float:
        """What is left of the present rest."""
        return max(0.0, self._until - time.monotonic())

    def note(self, began: float, failed: bool) -> None:
        """Take note of the end of an attempt that began then (monotonic seconds): whether the infrastructure failed."""
        if not failed:
            self._failures, self._length, self._until = 0, 0.0, 0.0
            return
        self._failures += 1
        if self._failures >= IN_A_ROW and began >= self._until:  # else it tells nothing new
            self._length = min(max(FIRST_SECONDS, 2 * self._length), LONGEST_SECONDS)
            self._until = time.monotonic() + self._length
