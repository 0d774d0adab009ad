"""Blocking work that an interrupted run does not wait for."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lightning_ray.threads import in_thread


async def test_the_result_and_the_error_come_back() -> None:
    assert await in_thread(lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(KeyError, match="gone"):
        await in_thread({}.__getitem__, "gone")


def test_nobody_waits_for_the_thread_of_a_cancelled_call() -> None:
    release = threading.Event()

    async def call_and_cancel() -> None:
        task = asyncio.create_task(in_thread(release.wait, 60))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began = time.monotonic()
    asyncio.run(call_and_cancel())
    assert time.monotonic() - began < 30
    release.set()
