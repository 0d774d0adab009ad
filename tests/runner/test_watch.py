"""What runners are watched by: their rest after failures, the watchdog over the loop, how many there are."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from lightning_ray.running import rest as rest_module
from lightning_ray.running import watchdog as watchdog_module
from lightning_ray.running.sizing import Sizing, crowded_node
from lightning_ray.running.watchdog import Watchdog


def test_a_runner_rests_longer_and_longer_and_no_longer_than_needed() -> None:
    rest, now = rest_module.Rest(), time.monotonic()
    for _ in range(2):
        rest.note(now, failed=True)
        rest.note(now, failed=True)
        assert not rest.seconds
        rest.note(now, failed=False)
    lengths = []
    for _ in range(3):
        rest.note(now, failed=True)
    for _ in range(3):
        lengths.append(rest.seconds)
        rest.note(now, failed=True)  # of an attempt from before this rest
        assert rest.seconds <= lengths[-1]
        rest.note(time.monotonic() + 60, failed=True)
    assert lengths[0] > 0 and lengths[1] > 1.5 * lengths[0] and lengths[2] > 1.5 * lengths[1]
    rest.note(now, failed=False)
    assert not rest.seconds


def block(seconds: float) -> None:
    time.sleep(seconds)


async def test_the_watchdog_beats_while_the_loop_is_blocked_and_ends_the_process_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog_module, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(watchdog_module, "HEARTBEAT_AFTER", 1.0)
    monkeypatch.setattr(watchdog_module, "BLOCKED_SECONDS", 3.0)
    calls: list[Any] = []
    over = threading.Event()

    class Deaf:
        async def heartbeat(self, worker_id: str, keys: Any) -> list[Any]:
            calls.append((worker_id, keys))
            return []

    watchdog = Watchdog(Deaf(), "w-1", lambda: [], over.set)  # type: ignore[arg-type]
    await asyncio.sleep(0.3)
    assert not calls and not over.is_set()
    block(1.5)
    assert calls[0] == ("w-1", []) and not over.is_set()
    block(2.0)
    assert over.is_set()
    watchdog.close()


def test_the_number_of_runners_follows_the_work() -> None:
    from lightning_ray.config import RunnerSettings

    sizing = Sizing(RunnerSettings(minimum=1, maximum=4, concurrency=10), shrink_seconds=5.0)
    assert [sizing.wanted(work) for work in (0, 10, 11, 35, 1000)] == [1, 1, 2, 4, 4]
    assert sizing.change(1, 35, now=0.0) == 3
    assert [sizing.change(4, 0, now) for now in (1.0, 5.9, 6.0)] == [0, 0, -1]
    assert sizing.change(3, 0, 7.0) == 0 and sizing.change(3, 35, 8.0) == 1
    assert sizing.change(3, 0, 12.0) == 0, "the time counts from the last need"


def test_a_crowded_node_is_one_with_two_more_than_another() -> None:
    assert crowded_node({"a": 2}, ["a"]) is None
    assert crowded_node({"a": 2, "b": 1}, ["a", "b"]) is None
    assert crowded_node({"a": 2}, ["a", "b"]) == ("a", "b")
    assert crowded_node({"a": 1, "gone": 3}, ["a", "b"]) is None
