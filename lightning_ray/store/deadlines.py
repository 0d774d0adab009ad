"""When to look at each attempt at work again, so that a watchdog looks at the few that may be late, and not at all.

A deadline may move away meanwhile (each sign of life moves it): who looks then says when to look again. Times are
Unix seconds of one clock; when that clock is set back, all are looked at.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Look = Callable[[str, str], float | None]
"""Looks at an attempt, by rollout and attempt id; when to do so again, or None for never."""


class Deadlines:
    """One time for each (rollout, attempt) id."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, tuple[str, str]]] = []
        self._looks: dict[tuple[str, str], tuple[float, int]] = {}
        """What of the heap counts: its other entries were replaced."""
        self._numbers = count()
        self._now = float("-inf")

    def watch(self, rollout_id: str, attempt_id: str, at: float | None) -> None:
        """Have an attempt looked at once ``at`` is past, and not when it was to be before; None: never."""
        pair = rollout_id, attempt_id
        _, number = self._looks.pop(pair, (at, None))
        if at is not None:
            self._push(at, next(self._numbers) if number is None else number, pair)

    def tick(self, now: float, look: Look) -> None:
        """Look at those that are due, in the order in which they were first watched."""
        if now < self._now:
            self._heap = [(now, number, pair) for pair, (_, number) in self._looks.items()]
            self._looks = {pair: (now, number) for _, number, pair in self._heap}
        self._now = now
        due: list[tuple[int, tuple[str, str]]] = []
        while self._heap and self._heap[0][0] <= now:
            at, number, pair = heapq.heappop(self._heap)
            if self._looks.get(pair) == (at, number):
                del self._looks[pair]
                due.append((number, pair))
        for number, pair in sorted(due):
            if (at_next := look(*pair)) is not None:
                self._push(at_next, number, pair)

    def _push(self, at: float, number: int, pair: tuple[str, str]) -> None:
        self._looks[pair] = at, number
        heapq.heappush(self._heap, (at, number, pair))
