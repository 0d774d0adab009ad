"""What this process waits for: whoever waits says so, that a person can be told.

    with waiting("weights of version 3", lambda: "2 of 4 replicas"):
        await ...

The names are of the process, not of a run: there is one run in it at a time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_open: dict[int, Wait] = {}
_numbers = itertools.count()


@dataclass(frozen=True)
class Wait:
    """One open wait. Seconds of ``time.monotonic``."""

    what: str
    on: Callable[[], str] | None = None
    """Tells how far it is."""
    since: float = field(default_factory=time.monotonic)


@contextmanager
def waiting(what: str, on: Callable[[], str] | None = None) -> Iterator[None]:
    """Name what is awaited within."""
    number = next(_numbers)
    _open[number] = Wait(what, on)
    try:
        yield
    finally:
        del _open[number]


def oldest_wait() -> float | None:
    """Since when the longest open wait lasts."""
    return min((wait.since for wait in list(_open.values())), default=None)


def open_waits(now: float | None = None) -> list[str]:
    """A line for each thing that is waited for, the longest first; waits of one name share theirs."""
    now = time.monotonic() if now is None else now
    by_name: dict[str, list[Wait]] = {}
    for wait in sorted(list(_open.values()), key=lambda wait: wait.since):
        by_name.setdefault(wait.what, []).append(wait)
    lines = []
    for what, [first, *others] in by_name.items():
        how_far = f": {first.on()}" if first.on is not None else ""
        also = f", and {len(others)} more like it" if others else ""
        lines.append(f"{what}, since {now - first.since:.0f} s{how_far}{also}")
    return lines
