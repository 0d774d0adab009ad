"""Clients that are gone, or read slowly, before the answer is whole: what is stored of their calls."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import pytest

from lightning_ray.semconv import SUPERSEDED_SPAN
from tests.capture_client import CHAT, Client, bearer, respond, sampling

AT = "/rollout/ro-1/attempt/at-1"


async def test_a_client_that_hangs_up_while_it_sends_its_request_leaves_nothing() -> None:
    client = Client()

    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError("there is nobody to answer")

    scope = {"type": "http", "method": "POST", "path": f"{AT}{CHAT}", "headers": bearer("ro-1", "at-1")}
    await client.edge(scope, receive, send)
    assert not parts and not client.app.scopes and not client.rows


async def test_a_client_that_hangs_up_before_the_first_token_leaves_nothing_sampled() -> None:
    client = Client()
    task = asyncio.create_task(client.call(body={"ids": [1], "delay": 30}))
    while not client.app.scopes:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [row] = client.rows
    assert row["status"] == "ERROR" and row["attributes"]["hung_up"] is True


async def test_a_client_that_hangs_up_leaves_what_was_sampled() -> None:
    client = Client()
    task = asyncio.create_task(client.call(body={"ids": [1], "stream": True, "delay": 30}))
    while b"7 " not in client.events:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [row] = client.rows
    assert (row["sampled_ids"], row["status"]) == ([7], "ERROR") and row["attributes"]["hung_up"] is True


async def test_a_client_that_hangs_up_after_the_last_token_leaves_the_whole_call() -> None:
    client = Client()

    async def gone(message: Any) -> None:
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        await client.call(send=gone)
    [row] = client.rows
    assert (row["sampled_ids"], row["status"]) == ([7, 8], "OK")


async def test_the_app_hears_of_a_hang_up() -> None:
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        first, second = await receive(), await receive()
        heard.append((first["body"], first["more_body"], second["type"]))

    hang_up = asyncio.Event()
    hang_up.set()
    await Client(app).call(body=b'{"a": 1}', hang_up=hang_up, chunk=2)
    assert heard == [(b'{"a": 1}', False, "http.disconnect")]


async def test_a_reader_that_stops_holds_the_app_up_and_its_call_is_stored_when_it_goes() -> None:
    """Nothing piles up: the app is held at the message that does not go out."""
    sent = 0
    stopped = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        sampled: list[int] = []
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with sampling([1], sampled):
            for token in range(1000):
                sampled.append(token)
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
                sent += 1

    async def slow(message: Any) -> None:
        if sent == 5:
            stopped.set()
            await asyncio.Event().wait()

    client = Client(app)
    tracemalloc.start()
    task = asyncio.create_task(client.call(send=slow))
    await stopped.wait()
    await asyncio.sleep(0.01)
    assert sent == 5 and tracemalloc.get_traced_memory()[0] < 3_000_000
    tracemalloc.stop()
    assert not client.rows
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [row["sampled_ids"] for row in client.rows] == [[0, 1, 2, 3, 4, 5]]


async def test_a_reader_that_stops_at_the_end_finds_its_call_stored() -> None:
    client = Client()

    async def slow(message: Any) -> None:
        if message.get("body") == b"[DONE]":
            await asyncio.Event().wait()

    task = asyncio.create_task(client.call(body={"stream": True}, send=slow))
    while "stored" not in client.events:
        await asyncio.sleep(0)
    assert client.events[:3] == [b"7 ", b"8 ", "stored"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(client.rows) == 1


async def test_a_call_that_the_app_left_open_is_stored_too() -> None:
    """A streaming response cancelled while it sends leaves its generators to the garbage collector."""
    left = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        call = sampling([1], [7])
        left.append(call)
        await call.__aenter__()
        raise ConnectionResetError("gone")

    client = Client(app)
    with pytest.raises(ConnectionResetError):
        await client.call()
    assert [row["sampled_ids"] for row in client.rows] == [[7]]
    await left[0].__aexit__(None, None, None)


async def leaves_when_told(scope: Any, receive: Any, send: Any) -> None:
    """As vLLM does: a disconnect cancels the call, and an answer of nothing goes out before the call has noticed."""

    async def sample() -> None:
        async with sampling([1], [7]):
            await asyncio.sleep(30)

    await receive()
    call = asyncio.ensure_future(sample())
    await asyncio.sleep(0)
    assert (await receive())["type"] == "http.disconnect"
    call.cancel()
    await respond(send, b"null")


async def test_an_answer_that_goes_out_after_the_client_is_gone_reaches_nobody() -> None:
    client, gone = Client(leaves_when_told), asyncio.Event()
    gone.set()
    await client.call(hang_up=gone)
    [row] = client.rows
    assert (row["sampled_ids"], row["status"]) == ([7], "ERROR") and row["attributes"]["hung_up"] is True


async def test_a_retry_takes_the_place_of_the_call_whose_client_was_gone() -> None:
    """There are two calls alike: one was answered, of the other its client gave up."""
    client, gone = Client(), asyncio.Event()
    gone.set()
    client.edge.app = leaves_when_told
    await client.call(hang_up=gone)
    client.edge.app = client.app
    await client.call()
    again = [*bearer("ro-1", "at-1"), (b"x-stainless-retry-count", b"1")]
    await client.call(headers=again)
    given_up, answered, retry = (row for row in client.rows if row["name"] != SUPERSEDED_SPAN)
    assert "hung_up" not in answered["attributes"] and given_up["attributes"]["hung_up"] is True
    assert retry["attributes"]["retry"] == 1
    assert [row["parent_id"] for row in client.rows if row["name"] == SUPERSEDED_SPAN] == [given_up["span_id"]]
