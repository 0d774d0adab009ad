"""The edge in front of a small ASGI app that samples as the engine half does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lightning_ray.capture import edge as edge_module
from lightning_ray.capture.call import SampledSequence, current_request
from lightning_ray.capture.edge import CaptureEdge
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store.schema import spans_to_batch

SECRET = b"s" * 32
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def sampling(prompt: list[int], sampled: list[int]) -> AsyncIterator[None]:
    """One call of the engine, as the engine half tells it to the edge."""
    request = current_request.get()
    assert request is not None
    name = str(len(request.sequences))

    def take_over() -> None:
        if request.running.pop(name, None) is not None:
            count = len(sampled)
            request.sequences.append(SampledSequence(prompt, list(sampled), [-0.5] * count, [3] * count, "stop"))

    request.running[name] = take_over
    try:
        yield
    finally:
        take_over()


async def respond(send: Any, body: bytes, more: bool = False) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": more})


class App:
    """Answers a chat with the body it got; the prompt is the body's ``ids``."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http" or scope["path"] in ("/health", "/v1/models"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"open"})
            return
        message = await receive()
        self.bodies.append(message["body"])
        body = json.loads(message["body"])
        ids = body.get("ids", [1])
        if not body.get("stream"):
            async with sampling(ids, [7, 8]):
                await asyncio.sleep(body.get("delay", 0))
            await respond(send, json.dumps({"ids": ids}).encode())
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sampled: list[int] = []
        async with sampling(ids, sampled):
            for token in (7, 8):
                sampled.append(token)
                await send({"type": "http.response.body", "body": f"{token} ".encode(), "more_body": True})
                await asyncio.sleep(body.get("delay", 0))
        await send({"type": "http.response.body", "body": b"[DONE]", "more_body": False})


class Client:
    """Calls the edge and keeps what it got, and in which order with the appends."""

    def __init__(self, app: Any = None) -> None:
        self.app = app or App()
        self.events: list[Any] = []
        self.rows: list[dict[str, Any]] = []
        self.not_ready: str | None = None
        self.failure: Exception | None = None
        self.edge = CaptureEdge(self.app, SECRET, self.append, self.ready)

    async def append(self, rows: list[dict[str, Any]]) -> None:
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        spans_to_batch(rows)
        self.rows += rows
        self.events.append("stored")

    async def ready(self) -> str | None:
        return self.not_ready

    async def call(
        self,
        path: str = f"/rollout/ro-1/attempt/at-1{CHAT}",
        body: bytes | dict[str, Any] = b'{"ids": [1, 2]}',
        headers: list[tuple[bytes, bytes]] | None = None,
        chunk: int | None = None,
        send: Callable[[Any], Any] | None = None,
    ) -> tuple[int, bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        size = chunk or max(1, len(raw))
        parts = [raw[at : at + size] for at in range(0, len(raw), size)] or [b""]
        status, answer = 0, b""

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await asyncio.Event().wait()
            raise AssertionError

        async def collect(message: Any) -> None:
            nonlocal status, answer
            if send is not None:
                await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                answer += message.get("body", b"")
                self.events.append(message.get("body", b""))

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"beta=true",
            "headers": bearer("ro-1", "at-1") if headers is None else headers,
        }
        await self.edge(scope, receive, collect)
        return status, answer


def bearer(
    rollout_id: str, attempt_id: str, expires: float | None = None, **sampling: Any
) -> list[tuple[bytes, bytes]]:
    claims = Claims(rollout_id, attempt_id, expires or time.time() + 60, sampling)
    return [(b"authorization", b"Bearer " + issue_key(SECRET, claims).encode())]


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "openai.chat.completion"),
        ("/v1/completions", "openai.completion"),
        ("/v1/responses", "openai.response"),
        ("/v1/messages", "anthropic.message"),
    ],
)
async def test_every_wire_api_becomes_a_span_of_its_attempt(client: Client, path: str, name: str) -> None:
    status, answer = await client.call(f"/rollout/ro-1/attempt/at-1{path}", {"ids": [1, 2], "model": "policy"})
    assert (status, json.loads(answer)) == (200, {"ids": [1, 2]})
    [row] = client.rows
    assert (row["rollout_id"], row["attempt_id"], row["name"], row["model"]) == ("ro-1", "at-1", name, "policy")
    assert (row["prompt_ids"], row["sampled_ids"], row["weight_versions"]) == ([1, 2], [7, 8], [3, 3])
    assert row["status"] == "OK" and row["attributes"]["request"] == {"ids": [1, 2], "model": "policy"}
    [scope] = client.app.scopes
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == (path, path.encode(), b"beta=true")


async def test_the_app_gets_the_body_whole_and_as_it_was_sent(client: Client) -> None:
    raw = b'{ "ids" : [1,2],  "text": "\xc3\xa4" }'
    assert (await client.call(body=raw, chunk=5))[0] == 200
    assert client.app.bodies == [raw]


async def test_anthropics_header_opens_too(client: Client) -> None:
    key = bearer("ro-1", "at-1")[0][1].removeprefix(b"Bearer ")
    assert (await client.call(headers=[(b"x-api-key", key)]))[0] == 200
    assert (await client.call(headers=[(b"authorization", b"Basic abc"), (b"x-api-key", key)]))[0] == 200


@pytest.mark.parametrize(
    ("path", "headers", "status", "reason"),
    [
        ("/v1/chat/completions", None, 404, "use /rollout/ID/attempt/ID/v1/"),
        ("/rollout/ro-1/attempt/at-1/metrics", None, 404, "no route"),
        ("/rollout/ro-1/attempt/at-1/v1/chat/completions/", None, 404, "not captured"),
        ("/rollout/ro-1/attempt/at-1/v1/chat/completions/batch", None, 404, "not captured"),
        ("/rollout/ro-1/attempt/at-1/v1/load_lora_adapter", None, 404, "not captured"),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", [], 401, "no key"),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", [(b"x-api-key", b"sk-1")], 401, "not a lightning-ray"),
        (f"/rollout/ro-1/attempt/at-2{CHAT}", None, 401, "belongs to attempt at-1, not at-2"),
        (f"/rollout/ro-2/attempt/at-1{CHAT}", None, 401, "belongs to attempt at-1"),
        ("/rollout/ro-1/attempt/at-2/v1/models", None, 401, "belongs to attempt at-1, not at-2"),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", bearer("ro-1", "at-1", 1.0), 401, "expired"),
    ],
)
async def test_what_is_not_open_is_refused_with_the_reason(
    client: Client, path: str, headers: Any, status: int, reason: str
) -> None:
    found, answer = await client.call(path, headers=headers)
    assert found == status and reason in json.loads(answer)["error"]["message"]
    assert not client.app.scopes and not client.rows


@pytest.mark.parametrize(
    ("body", "reason"), [(b"{nope", "not JSON"), (b"[1]", "not list"), (b"\xff", "not JSON"), (b"", "JSON")]
)
async def test_a_body_that_is_no_object_is_refused(client: Client, body: bytes, reason: str) -> None:
    status, answer = await client.call(body=body)
    assert status == 400 and reason in json.loads(answer)["error"]["message"] and not client.app.scopes


async def test_a_body_that_is_too_large_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_module, "MAX_BODY_BYTES", 20)
    assert (await client.call(body=b'{"ids": [1, 2, 3]}  ', chunk=3))[0] == 200
    status, answer = await client.call(body=b'{"ids": [1, 2, 3]}   ', chunk=3)
    assert status == 413 and b"larger than 20 bytes" in answer and len(client.app.scopes) == 1


async def test_a_replica_that_is_not_ready_says_why_and_its_health_stays_open(client: Client) -> None:
    client.not_ready = "no proved weights"
    status, answer = await client.call()
    assert status == 503 and b"no proved weights" in answer and not client.app.scopes
    assert await client.call("/health", headers=[]) == (200, b"open")


async def test_the_models_are_listed_without_a_span(client: Client) -> None:
    assert await client.call("/rollout/ro-1/attempt/at-1/v1/models") == (200, b"open")
    assert not client.rows


async def test_a_websocket_is_closed_and_the_lifespan_passes(client: Client) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is to be received")

    await client.edge({"type": "websocket", "path": "/v1/realtime"}, receive, send)
    assert [m["type"] for m in sent] == ["websocket.close"] and not client.app.scopes
    await client.edge({"type": "lifespan"}, receive, send)
    assert [scope["type"] for scope in client.app.scopes] == ["lifespan"]


async def test_the_span_is_stored_before_a_plain_answer_goes_out(client: Client) -> None:
    await client.call()
    assert client.events == ["stored", b'{"ids": [1, 2]}']


async def test_the_span_is_stored_before_the_end_of_a_streamed_answer_goes_out(client: Client) -> None:
    await client.call(body={"ids": [1], "stream": True})
    assert client.events == [b"7 ", b"8 ", "stored", b"[DONE]"]
    assert len(client.rows) == 1


async def test_a_request_that_samples_twice_leaves_both_calls(client: Client) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for prompt in ([1], [1, 7, 2]):
            async with sampling(prompt, [7]):
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    twice = Client(app)
    await twice.call()
    assert twice.events == ["stored", b"part", "stored", b"part", b""]
    assert [row["prompt_ids"] for row in twice.rows] == [[1], [1, 7, 2]]
    assert len({row["span_id"] for row in twice.rows}) == 2 and len({row["trace_id"] for row in twice.rows}) == 1


async def test_a_client_that_hangs_up_leaves_what_was_sampled() -> None:
    client = Client()
    task = asyncio.create_task(client.call(body={"ids": [1], "stream": True, "delay": 30}))
    while b"7 " not in client.events:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [row] = client.rows
    assert row["sampled_ids"] == [7]


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


async def test_an_append_that_is_interrupted_is_made_good() -> None:
    client = Client()
    seen: list[list[dict[str, Any]]] = []
    begun = asyncio.Event()

    async def append(rows: list[dict[str, Any]]) -> None:
        seen.append(list(rows))
        begun.set()
        if len(seen) == 1:
            await asyncio.sleep(30)

    client.edge.append = append
    task = asyncio.create_task(client.call())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(seen) == 2 and [row["span_id"] for row in seen[0]] == [row["span_id"] for row in seen[1]]


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


async def test_the_keys_sampling_parameters_reach_the_engine_half() -> None:
    found = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = current_request.get()
        assert request is not None
        found.append(request.sampling)
        await respond(send, b"")

    await Client(app).call(headers=bearer("ro-1", "at-1", temperature=0.0))
    assert found == [{"temperature": 0.0}]


async def test_requests_at_the_same_time_never_mix(client: Client) -> None:
    async def one(number: int) -> None:
        rollout_id, attempt_id = f"ro-{number}", f"at-{number}"
        status, _ = await client.call(
            f"/rollout/{rollout_id}/attempt/{attempt_id}{CHAT}",
            {"ids": [number], "stream": number % 2 == 0, "delay": (number * 7 % 11) / 1000},
            bearer(rollout_id, attempt_id),
        )
        assert status == 200

    await asyncio.gather(*(one(number) for number in range(200)))
    assert len(client.rows) == 200
    for row in client.rows:
        assert [f"ro-{i}" for i in row["prompt_ids"]] == [row["rollout_id"]]
        assert row["attempt_id"] == row["rollout_id"].replace("ro", "at")
    assert len({row["span_id"] for row in client.rows}) == 200
