"""A client that is dropped unclosed takes no other call with it."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
import pytest_asyncio

from lightning_ray.dropped import forget_collected

ANSWER = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}).encode()
HEAD = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(ANSWER)}\r\n\r\n".encode()
ANSWER_SECONDS = 0.3


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: a call's answer takes a while if its model is called ``slow``."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            [length] = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await asyncio.sleep(ANSWER_SECONDS if b"slow" in await reader.readexactly(length) else 0)
            writer.write(HEAD + ANSWER)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


@pytest_asyncio.fixture
async def address() -> AsyncIterator[str]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    server.close()


@pytest.fixture
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in another thread, as Ray Serve's in a process that has a handle."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    gc.disable()
    yield loop
    gc.enable()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def collect() -> None:
    """And keep the loop from what finalizers want of it, until another connection has the number."""
    gc.collect()
    time.sleep(ANSWER_SECONDS / 2)


async def call(address: str, model: str) -> None:
    client = openai.AsyncOpenAI(base_url=address, api_key="key", max_retries=0, timeout=5 * ANSWER_SECONDS)
    await client.chat.completions.create(model=model, messages=[])


@pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.asyncio
async def test_a_call_is_answered_though_a_dropped_client_is_closed_meanwhile(
    address: str, other_loop: asyncio.AbstractEventLoop
) -> None:
    forget_collected()
    forget_collected()
    for _ in range(3):
        await call(address, "fast")
        other_loop.call_soon_threadsafe(collect)
        await asyncio.sleep(ANSWER_SECONDS / 5)
        await call(address, "slow")
