"""A client that is dropped unclosed takes no other call with it."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from asyncio import selector_events
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import pytest_asyncio

from lightning_ray.dropped import NO_SOCKET, forget_collected
from lightning_ray.instrumentation import instrument_clients

ANSWER = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}).encode()
HEAD = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(ANSWER)}\r\n\r\n".encode()
READ_SECONDS = 0.1
"""For a client to wait for what it is answered."""
DEADLINE = 10.0
CONNECTIONS = 40


class Meeting:
    """What is to happen before what else."""

    def __init__(self) -> None:
        self.collected = threading.Event()
        self.asked = threading.Event()

    def collect(self) -> None:
        """And keep the loop from what finalizers want of it, until another connection has the number."""
        gc.collect()
        self.collected.set()
        self.asked.wait(DEADLINE)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. A call of the model ``slow`` is answered when the loop was let go."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                [length] = [
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                ]
                if b"slow" in await reader.readexactly(length):
                    await asyncio.sleep(READ_SECONDS)
                    self.asked.set()
                    await asyncio.sleep(READ_SECONDS)
                writer.write(HEAD + ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@pytest.fixture
def meeting() -> Meeting:
    return Meeting()


@pytest_asyncio.fixture
async def address(meeting: Meeting) -> AsyncIterator[str]:
    server = await asyncio.start_server(meeting.answer, "127.0.0.1", 0)
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


async def call(address: str, model: str) -> None:
    """Of a client that is dropped unclosed."""
    client = openai.AsyncOpenAI(base_url=address, api_key="key", max_retries=0, timeout=DEADLINE)
    await client.chat.completions.create(model=model, messages=[])


@pytest.mark.asyncio
async def test_a_call_is_answered_though_a_dropped_client_is_closed_meanwhile(
    address: str, other_loop: asyncio.AbstractEventLoop, meeting: Meeting
) -> None:
    forget_collected()
    await call(address, "fast")
    other_loop.call_soon_threadsafe(meeting.collect)
    assert await asyncio.to_thread(meeting.collected.wait, DEADLINE)
    await call(address, "slow")
    gc.collect()
    await asyncio.sleep(READ_SECONDS)


@pytest.mark.asyncio
async def test_many_calls_are_answered_though_a_dropped_client_closes_as_many_connections(address: str) -> None:
    forget_collected()
    for _ in range(2):
        client = openai.AsyncOpenAI(base_url=address, api_key="key", max_retries=0, timeout=DEADLINE)
        await asyncio.gather(*(client.chat.completions.create(model="slow", messages=[]) for _ in range(CONNECTIONS)))
        del client
        gc.collect()


def test_what_prepares_a_process_for_agents_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector_events._SelectorTransport, "__del__", lambda transport: None)  # type: ignore[attr-defined]
    instrument_clients()
    transport: Any = SimpleNamespace(_sock_fd=5)
    selector_events._SelectorTransport.__del__(transport)  # type: ignore[attr-defined]
    assert transport._sock_fd == NO_SOCKET


def test_once_is_enough() -> None:
    forget_collected()
    before = selector_events._SelectorTransport.__del__  # type: ignore[attr-defined]
    forget_collected()
    assert selector_events._SelectorTransport.__del__ is before  # type: ignore[attr-defined]
