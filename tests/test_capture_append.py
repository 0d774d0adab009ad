"""Shared appends: one among few waits for nothing, what comes meanwhile goes together, a refusal is its own call's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lightning_ray.capture.append import MANY_CALLS, PATIENCE_SECONDS, ROWS_AT_ONCE, SHARE, SharedAppend
from lightning_ray.errors import StoreError


class Disk:
    """Notes what was appended together; holds while ``gate`` is shut, refuses rows named ``bad``."""

    def __init__(self) -> None:
        self.appends: list[list[Any]] = []
        self.gate = asyncio.Event()
        self.durable: list[Any] = []

    async def append(self, rows: list[dict[str, Any]]) -> None:
        names = [row["name"] for row in rows]
        self.appends.append(names)
        await self.gate.wait()
        if "bad" in names:
            raise StoreError("bad rows")
        self.durable += names


def rows(*names: Any) -> list[dict[str, Any]]:
    return [{"name": name} for name in names]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_comes_while_an_append_is_under_way_goes_together_and_returns_when_durable() -> None:
    disk = Disk()
    append = SharedAppend(disk.append)
    calls = [asyncio.create_task(append(rows(0)))]
    await turns()
    calls += [asyncio.create_task(append(rows(number, -number))) for number in (1, 2)]
    await turns()
    assert disk.appends == [[0]] and not any(call.done() for call in calls)
    disk.gate.set()
    await asyncio.gather(*calls)
    assert disk.appends == [[0], [1, -1, 2, -2]]
    await append(rows(3))
    assert disk.durable == [0, 1, -1, 2, -2, 3]


async def test_a_refusal_is_told_to_its_own_call_alone() -> None:
    disk = Disk()
    append = SharedAppend(disk.append)
    calls = [asyncio.create_task(append(rows(name))) for name in ("first", "a", "bad", "b")]
    await turns()
    disk.gate.set()
    told = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in told] == [type(None), type(None), StoreError, type(None)]
    assert set(disk.durable) == {"first", "a", "b"}


async def test_an_append_is_bounded_and_a_call_given_up_is_stored_all_the_same() -> None:
    disk = Disk()
    append = SharedAppend(disk.append)
    calls = [asyncio.create_task(append(rows(*range(100)))) for _ in range(5)]
    await turns()
    calls[2].cancel()
    disk.gate.set()
    told = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in told] == [False, False, True, False, False]
    assert len(disk.durable) == 500
    assert max(map(len, disk.appends)) <= ROWS_AT_ONCE


async def test_one_call_may_be_larger_than_the_bound() -> None:
    disk = Disk()
    disk.gate.set()
    with pytest.raises(StoreError):
        await SharedAppend(disk.append)(rows("bad"))
    await SharedAppend(disk.append)(rows(*range(ROWS_AT_ONCE + 1)))
    assert len(disk.durable) == ROWS_AT_ONCE + 1


async def test_where_many_calls_are_at_work_rows_wait_for_those_of_others_until_there_are_enough() -> None:
    disk = Disk()
    disk.gate.set()
    append = SharedAppend(disk.append, lambda: 4 * SHARE)
    calls = [asyncio.create_task(append(rows(number))) for number in range(3)]
    await turns()
    assert not disk.appends
    await append(rows(3))
    await asyncio.gather(*calls)
    assert disk.appends == [[0, 1, 2, 3]]


async def test_rows_wait_no_longer_than_the_patience_lasts() -> None:
    disk = Disk()
    disk.gate.set()
    async with asyncio.timeout(1000 * PATIENCE_SECONDS):
        await SharedAppend(disk.append, lambda: 1000)(rows(0))
    assert disk.durable == [0]


async def test_among_few_calls_rows_wait_for_nothing() -> None:
    disk = Disk()
    disk.gate.set()
    append = SharedAppend(disk.append, lambda: MANY_CALLS - 1)
    first = asyncio.create_task(append(rows(0)))
    await turns()
    assert first.done() and disk.durable == [0]
