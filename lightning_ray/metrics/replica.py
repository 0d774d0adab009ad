"""The metrics of one replica: what its engine is at, and the calls that it answered.

A call costs the replica one append to a list; the list is counted every few seconds, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_ray.metrics.exporter import Exporter

REPORT_SECONDS = 5.0
PARTS = ("queue", "first_token", "total")
TOKENS = {
    "prompt_tokens": "prompt_tokens",
    "cached_tokens": "cached_tokens",
    "answered_tokens": "completion_tokens",
}
"""Counter -> what a call's usage calls it."""


class ReplicaMetrics:
    """See the module. ``tags`` are run and policy; ``state`` tells ``describe`` and the load."""

    def __init__(self, tags: Mapping[str, str], replica: str, state: Callable[[], Mapping[str, Any]]):
        self._export = Exporter(replica=replica, **tags)
        self._state = state
        self._calls: list[Mapping[str, Any]] = []

    def note(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows on their way to the store; those of model calls are counted."""
        self._calls += [row for row in rows if row.get("prompt_ids") is not None]

    async def report(self) -> None:
        """Export, every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            with contextlib.suppress(Exception):  # nobody is kept from an answer by a figure
                calls, self._calls = self._calls, []
                await asyncio.to_thread(self.export, dict(self._state()), calls)

    def export(self, state: Mapping[str, Any], calls: Iterable[Mapping[str, Any]]) -> None:
        """Export once: the state, and calls that were not exported before."""
        for name in ("running", "waiting", "version"):
            self._export.set(f"replica_{name}", state.get(name))
        self._export.set("replica_cache_use", state.get("kv_cache_use"))
        self._export.set("replica_proved", int(state["proved"]))
        finishes, tokens = Counter[str](), Counter[str]()
        for row in calls:
            finishes[row["finish_reason"] or "broken_off"] += 1
            usage, timing = row["attributes"]["usage"], row["attributes"]["timing"]
            tokens.update({counter: usage.get(name) or 0 for counter, name in TOKENS.items()})
            for part in PARTS:
                self._export.observe("call_seconds", timing.get(part), part=part)
        for finish, count in finishes.items():
            self._export.add("calls", count, finish=finish)
        for counter, count in tokens.items():
            self._export.add(counter, count)
