"""Blocking work that an interrupted run does not wait for."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lightning_ray.threads import ask_ray, in_thread, until_nobody_asks


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


async def test_what_threads_ask_ray_is_waited_for_even_if_who_asked_is_cancelled() -> None:
    release, ended = threading.Event(), threading.Event()

    def question() -> None:
        release.wait(60)
        ended.set()

    task = asyncio.create_task(ask_ray(question))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    asyncio.get_running_loop().call_later(0.1, release.set)
    await until_nobody_asks(30.0)
    assert ended.is_set()


async def test_a_thread_that_ray_does_not_answer_is_not_waited_for_for_ever() -> None:
    release = threading.Event()
    task = asyncio.create_task(ask_ray(release.wait, 60))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await until_nobody_asks(0.1)
    assert time.monotonic() - began < 30
    release.set()
    assert await task
    await until_nobody_asks(0.0)
