"""Answers on their way out: no byte of an end before its call is durable, and how far each call has come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lightning_ray.capture.call import current_request
from lightning_ray.errors import InfrastructureError, StoreError
from tests.capture_client import App, Client, sampling


@pytest.fixture
def client() -> Client:
    return Client()


async def test_a_call_that_the_app_keeps_to_itself_is_told_from_one_at_the_engine_and_from_a_slow_reader() -> None:
    came, go_on, answered, reading = (asyncio.Event() for _ in range(4))

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        came.set()
        await go_on.wait()
        await App()(scope, receive, send)

    async def read(message: Any) -> None:
        answered.set()
        await reading.wait()

    client = Client(slow)
    assert client.edge.calls() == {"calls": 0, "oldest_call": None}
    call = asyncio.create_task(client.call(send=read))
    await asyncio.wait_for(came.wait(), 10)
    await asyncio.sleep(0.05)
    assert client.edge.held_up() >= 0.04
    oldest = client.edge.calls()["oldest_call"]
    assert oldest["stage"] == "on its way to the engine" and oldest["seconds"] > 0
    go_on.set()
    await asyncio.wait_for(answered.wait(), 10)
    assert not call.done() and client.edge.held_up() == 0
    assert client.edge.calls()["calls"] == 1 and client.edge.calls()["oldest_call"]["stage"] == "going out"
    reading.set()
    assert (await call)[0] == 200 and client.edge.held_up() == 0 and client.edge.calls()["calls"] == 0


async def test_an_answer_tells_its_weight_version(client: Client) -> None:
    await client.call()
    assert client.headers["x-lightning-weight-version"] == "3"
    await client.call(body={"stream": True})
    assert client.headers["x-lightning-weight-version"] == "9"


async def test_the_span_is_stored_before_a_plain_answer_goes_out(client: Client) -> None:
    await client.call()
    assert client.events == ["stored", b'{"ids": [1, 2]}']


async def test_the_span_is_stored_before_the_end_of_a_streamed_answer_goes_out(client: Client) -> None:
    await client.call(body={"ids": [1], "stream": True})
    assert client.events == [b"7 ", b"8 ", "stored", b"[DONE]"]
    assert len(client.rows) == 1


async def test_a_request_that_samples_twice_leaves_both_calls() -> None:
    stages: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for prompt in ([1], [1, 7, 2]):
            async with sampling(prompt, [7]):
                await asyncio.sleep(0)
                stages.append(twice.edge.calls()["oldest_call"]["stage"])
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    twice = Client(app)
    await twice.call()
    assert twice.events == ["stored", b"part", "stored", b"part", b""] and stages == ["in the engine"] * 2
    assert [row["prompt_ids"] for row in twice.rows] == [[1], [1, 7, 2]]
    assert len({row["span_id"] for row in twice.rows}) == 2 and len({row["trace_id"] for row in twice.rows}) == 1


async def test_the_span_is_on_its_way_while_the_app_builds_its_answer(client: Client) -> None:
    task = asyncio.create_task(client.call(body={"building": 30}))
    while not client.rows:
        await asyncio.sleep(0)
    assert client.events == ["stored"] and not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(client.rows) == 1


async def test_no_byte_after_the_end_of_sampling_goes_out_before_it_is_durable() -> None:
    client = Client()
    durable = asyncio.Event()

    async def append(rows: list[dict[str, Any]]) -> None:
        await durable.wait()
        client.events.append("stored")

    client.edge.append = append
    for body, before in (({}, []), ({"stream": True}, [b"7 ", b"8 "])):
        client.events.clear()
        durable.clear()
        task = asyncio.create_task(client.call(body=body))
        async with asyncio.timeout(10):
            while (client.edge.calls()["oldest_call"] or {}).get("stage") != "being stored":
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert client.events == before and not task.done()
        durable.set()
        await task
        assert client.events[len(before)] == "stored" and len(client.events) == len(before) + 2


async def test_an_append_that_is_interrupted_is_awaited_and_not_sent_twice() -> None:
    client = Client()
    seen: list[list[dict[str, Any]]] = []
    begun, durable = asyncio.Event(), asyncio.Event()

    async def append(rows: list[dict[str, Any]]) -> None:
        seen.append(list(rows))
        begun.set()
        await durable.wait()

    client.edge.append = append
    task = asyncio.create_task(client.call())
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    durable.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(seen) == 1 and len(seen[0]) == 1


@pytest.mark.parametrize(
    ("failure", "expected"), [(InfrastructureError("store gone"), 503), (StoreError("unknown attempt"), 400)]
)
async def test_a_call_that_cannot_be_stored_is_not_answered(client: Client, failure: Exception, expected: int) -> None:
    client.failure = failure
    status, answer = await client.call()
    assert status == expected and str(failure) in json.loads(answer)["error"]["message"]
    assert b"ids" not in answer


async def test_a_stream_that_cannot_be_stored_does_not_end_well(client: Client) -> None:
    client.failure = InfrastructureError("store gone")
    with pytest.raises(InfrastructureError):
        await client.call(body={"stream": True})
    assert b"[DONE]" not in client.events


async def test_an_error_of_the_app_passes_through_without_a_span() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"bad temperature"})

    client = Client(app)
    assert await client.call() == (400, b"bad temperature")
    assert not client.rows and current_request.get() is None
