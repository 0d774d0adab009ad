"""The edge in front of a small ASGI app that samples as the engine half does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lightning_ray.capture import edge
from lightning_ray.capture.call import current_request
from lightning_ray.capture.edge import Limits
from lightning_ray.semconv import CLIENT_SPAN
from lightning_ray.traces.ids import to_header, trace_id_of
from tests.capture_client import CHAT, TOKENIZE, Client, bearer, operator, respond

AT = "/rollout/ro-1/attempt/at-1"


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


async def test_a_call_is_of_its_attempt_s_trace_and_names_the_client_s_span(client: Client) -> None:
    trace, span = trace_id_of("ro-1", "at-1"), "00f067aa0ba902b7"
    for own in (to_header(trace, span), to_header("0" * 31 + "1", span)):
        assert (await client.call(headers=[*bearer("ro-1", "at-1"), (b"traceparent", own.encode())]))[0] == 200
    assert [row["trace_id"] for row in client.rows] == [trace] * 2
    assert [row["attributes"].get(CLIENT_SPAN) for row in client.rows] == [span, None]
    assert [row["parent_id"] for row in client.rows] == [None] * 2, "it stays where trajectories look for it"


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
async def test_the_app_gets_the_body_whole_and_as_it_was_sent(client: Client, path: str) -> None:
    raw = b'{ "ids" : [1,2],  "text": "\xc3\xa4" }'
    assert (await client.call(AT + path, raw, chunk=5))[0] == 200
    assert client.app.bodies == [raw]


async def test_anthropics_header_opens_too(client: Client) -> None:
    key = bearer("ro-1", "at-1")[0][1].removeprefix(b"Bearer ")
    assert (await client.call(headers=[(b"x-api-key", key)]))[0] == 200
    assert (await client.call(headers=[(b"authorization", b"Basic abc"), (b"x-api-key", key)]))[0] == 200


@pytest.mark.parametrize(
    ("path", "headers", "status", "reason"),
    [
        ("/metrics", None, 404, "/metrics is not captured; use one of /v1/chat/completions"),
        ("/v1/realtime", None, 404, "not captured"),
        ("/rollout/ro-1/attempt/at-1", None, 404, "not captured"),
        ("/rollout/ro-1/attempt/at-1/metrics", None, 404, "not captured"),
        ("/rollout/ro-1/attempt/at-1/v1/chat/completions/", None, 404, "not captured"),
        ("/rollout/ro-1/attempt/at-1/v1/chat/completions/batch", None, 404, "not captured"),
        ("/rollout/ro-1/attempt/at-1/v1/load_lora_adapter", None, 404, "not captured"),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", [], 401, "no key"),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", [(b"x-api-key", b"sk-1")], 401, "not a lightning-ray"),
        (f"/rollout/ro-1/attempt/at-2{CHAT}", None, 401, "belongs to attempt at-1, not at-2"),
        (f"/rollout/ro-2/attempt/at-1{CHAT}", None, 401, "belongs to attempt at-1"),
        ("/rollout/ro-1/attempt/at-2/v1/models", None, 401, "belongs to attempt at-1, not at-2"),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", bearer("ro-1", "at-1", 1.0), 401, "expired"),
        (f"/rollout/ro-1/attempt/at-1{CHAT}", operator(), 401, "the operator's key opens no attempt"),
        (CHAT, operator(), 401, "the operator's key opens no attempt"),
        ("/v1/models", [], 401, "no key"),
        ("/status", [], 401, "no key"),
        ("/status", None, 401, "the status is for the operator's"),
    ],
)
async def test_what_is_not_open_is_refused_with_the_reason(
    client: Client, path: str, headers: Any, status: int, reason: str
) -> None:
    found, answer = await client.call(path, headers=headers)
    assert found == status and reason in json.loads(answer)["error"]["message"]
    assert not client.app.scopes and not client.rows


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{nope", "not JSON"),
        (b"[1]", "not list"),
        (b"\xff", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"", "JSON"),
        (b"NaN", "not float"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a": ' + DEEP, "nested too deeply"),
        (b'{"a": ' + b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"base64": ' + b"[" * 900 + b"]" * 900 + b"}", "nested too deeply"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(client: Client, body: bytes, reason: str) -> None:
    status, answer = await client.call(body=body)
    assert status == 400 and reason in json.loads(answer)["error"]["message"] and not client.app.scopes


@pytest.mark.parametrize("value", [b'"\\ud800"', b"1" * 40])
async def test_a_body_that_cannot_be_stored_is_the_callers_fault(client: Client, value: bytes) -> None:
    status, answer = await client.call(body=b'{"ids": [1], "odd": ' + value + b"}")
    assert status == 400 and "could not be stored" in json.loads(answer)["error"]["message"]
    assert (await client.call())[0] == 200


async def test_odd_but_legal_json_is_kept_as_the_app_reads_it(client: Client) -> None:
    raw = b'{"ids": [9], "ids": [1], "x": NaN, "y": -Infinity, "\\u0000": null}'
    assert await client.call(body=raw) == (200, b'{"ids": [1]}')
    [row] = client.rows
    request = row["attributes"]["request"]
    assert request["ids"] == [1] and request["x"] != request["x"] and request["y"] == float("-inf")
    assert client.app.bodies == [raw]


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
async def test_a_body_that_is_too_large_is_refused(path: str) -> None:
    client = Client(limits=Limits(body_bytes=20))
    assert (await client.call(AT + path, b'{"ids": [1, 2, 3]}  ', chunk=3))[0] == 200
    status, answer = await client.call(AT + path, b'{"ids": [1, 2, 3]}   ', chunk=3)
    assert status == 413 and b"larger than 20 bytes" in answer and len(client.app.scopes) == 1


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
async def test_a_body_that_stays_away_is_not_waited_for(
    client: Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.05)
    status, answer = await client.call(AT + path, whole=False)
    assert status == 408 and b"nothing more of the request body came for 0.05 s" in answer and not client.app.scopes


async def test_errors_have_the_shape_that_the_client_reads(client: Client) -> None:
    cases: list[tuple[bytes, list[tuple[bytes, bytes]] | None, int, str]] = [
        (b"{", None, 400, "invalid_request_error"),
        (b"{}", [], 401, "authentication_error"),
    ]
    for body, headers, status, kind in cases:
        found, answer = await client.call(f"{AT}/v1/messages", body, headers)
        error = json.loads(answer)
        assert (found, error["type"], error["error"]["type"]) == (status, "error", kind)
        found, answer = await client.call(f"{AT}{CHAT}", body, headers)
        error = json.loads(answer)["error"]
        assert (found, error["type"], error["code"], error["param"]) == (status, kind, status, None)
        assert client.headers["content-type"] == "application/json"


async def test_the_key_alone_opens_its_attempt(client: Client) -> None:
    for path in (CHAT, f"/agent/planner{CHAT}", f"{AT}/agent/planner{CHAT}"):
        assert (await client.call(path))[0] == 200
    assert {(row["rollout_id"], row["attempt_id"]) for row in client.rows} == {("ro-1", "at-1")}
    assert [row["agent"] for row in client.rows] == [None, "planner", "planner"]
    assert {scope["path"] for scope in client.app.scopes} == {CHAT}


async def test_an_agent_may_have_any_name(client: Client) -> None:
    """The server has decoded ``path``, and left ``raw_path`` as it was sent."""
    await client.call(f"/agent/a/b {CHAT}", raw_path=b"/agent/a%2Fb%20" + CHAT.encode())
    await client.call(f"/agent/50%20off{CHAT}", raw_path=b"/agent/50%2520off" + CHAT.encode())
    await client.call(f"/agent/über{CHAT}", raw_path=b"/to/other/agent/%C3%BCber" + CHAT.encode())
    assert [row["agent"] for row in client.rows] == ["a/b ", "50%20off", "über"]


async def test_what_a_server_mounts_it_under_is_taken_off() -> None:
    client = Client()
    mounted = client.edge.app
    outer = client.edge

    async def under(scope: Any, receive: Any, send: Any) -> None:
        await outer({**scope, "root_path": "/policy"}, receive, send)

    client.edge = under  # type: ignore[assignment]
    assert (await client.call(f"/policy{AT}{CHAT}"))[0] == 200
    assert mounted.scopes[0]["path"] == CHAT and mounted.scopes[0]["root_path"] == ""


async def test_the_status_is_the_operators(client: Client) -> None:
    assert await client.call("/status", headers=operator()) == (200, b'{"version": 9}')
    assert (await client.call(f"{AT}/status", headers=operator()))[0] == 404
    assert not client.app.scopes


async def test_a_replica_that_is_not_ready_says_why_and_its_health_stays_open(client: Client) -> None:
    client.not_ready = "no proved weights"
    status, answer = await client.call()
    assert status == 503 and b"no proved weights" in answer and not client.app.scopes
    assert await client.call("/health", headers=[]) == (200, b"open")


async def test_the_models_are_listed_without_a_span(client: Client) -> None:
    for path in ("/v1/models", f"{AT}/v1/models"):
        assert await client.call(path) == (200, b"open")
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


async def test_the_keys_sampling_parameters_reach_the_engine_half() -> None:
    found = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = current_request.get()
        assert request is not None
        found.append(request.caller.sampling)
        await respond(send, b"")

    await Client(app).call(headers=bearer("ro-1", "at-1", temperature=0.0))
    assert found == [{"temperature": 0.0}]


async def test_an_attempt_has_so_many_calls_at_once_and_no_more() -> None:
    client = Client(limits=Limits(calls_per_attempt=3))
    running = [asyncio.create_task(client.call(body={"delay": 30})) for _ in range(3)]
    while len(client.app.scopes) < 3:
        await asyncio.sleep(0)
    status, answer = await client.call(f"{AT}/v1/messages")
    assert status == 429 and client.headers["retry-after"] == "1"
    assert json.loads(answer)["error"] == {
        "type": "rate_limit_error",
        "message": "attempt at-1 has 3 calls at once already; wait",
    }
    assert (await client.call(CHAT, headers=bearer("ro-1", "at-2")))[0] == 200
    assert (await client.call(f"{AT}/v1/models"))[0] == 200
    ended = running.pop()
    ended.cancel()
    await asyncio.gather(ended, return_exceptions=True)
    assert (await client.call())[0] == 200
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for _ in range(5):
        assert (await client.call())[0] == 200
    assert not client.edge._at_once


async def test_a_thousand_requests_at_the_same_time_never_mix() -> None:
    client = Client()

    async def one(number: int) -> None:
        rollout_id, attempt_id = f"ro-{number}", f"at-{number}"
        status, _ = await client.call(
            f"/rollout/{rollout_id}/attempt/{attempt_id}{CHAT}" if number % 3 else CHAT,
            {"ids": [number], "stream": number % 2 == 0, "delay": (number * 7 % 11) / 1000},
            bearer(rollout_id, attempt_id),
        )
        assert status == 200

    await asyncio.gather(*(one(number) for number in range(1000)))
    assert len(client.rows) == 1000
    for row in client.rows:
        assert [f"ro-{i}" for i in row["prompt_ids"]] == [row["rollout_id"]]
        assert row["attempt_id"] == row["rollout_id"].replace("ro", "at")
    assert len({row["span_id"] for row in client.rows}) == 1000
