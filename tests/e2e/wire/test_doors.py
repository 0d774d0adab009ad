"""What the public port opens, to whom, and what it keeps shut."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import time
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest

from lightning_ray.capture.dialects import DIALECTS
from lightning_ray.capture.edge import PASSED
from lightning_ray.capture.keys import Claims, issue_key
from tests.e2e.wire.clients import MESSAGES, MOST, PROMPT, QUESTION
from tests.e2e.wire.served import MODEL, Served

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": PROMPT},
    "/v1/responses": {"input": QUESTION},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": MOST},
}
VERSION = "x-lightning-weight-version"


def closed_routes() -> list[str]:
    """Every route that vLLM's sources name, dev mode's and control included, but those that are open."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    sources = (Path(spec.origin).parent / "entrypoints").rglob("*.py")
    route = re.compile(r"""@\w+\.(?:get|post|put|delete|api_route)\(\s*"(/[^"]*)\"""")
    found = {path for source in sources for path in route.findall(source.read_text())}
    found |= {
        "/metrics",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/load_lora_adapter",
        "/v1/responses/resp_1",
        "/server_info",
    }
    return sorted(found - {*DIALECTS, *PASSED, "/health"})


@pytest.mark.parametrize("path", BODIES)
async def test_every_answer_tells_its_weight_version(served: Served, path: str) -> None:
    session = await served.attempt()
    for stream in (False, True):
        answer = await session.post(path, {"model": MODEL, **BODIES[path], "stream": stream})
        assert answer.status_code == 200 and answer.headers[VERSION] == "0"
    refused = await session.post(path, {"model": "another", **BODIES[path]})
    assert refused.status_code == 404 and refused.headers[VERSION] == "0"


async def test_a_key_opens_its_own_attempt_alone(served: Served) -> None:
    mine, other = await served.attempt(), await served.attempt()
    claims = Claims(mine.rollout_id, mine.attempt_id, time.time() - 1)
    stale = issue_key(served.cluster.secret, claims)
    forged = issue_key(b"x" * 32, claims)
    operator = served.operator()["authorization"].removeprefix("Bearer ")
    cases = {
        other.key: "belongs to attempt",
        stale: "has expired",
        forged: "signature is wrong",
        mine.key[:-2]: "signature is wrong",
        "sk-guess": "not a lightning-ray attempt key",
        operator: "opens no attempt",
    }
    for key, reason in cases.items():
        client = openai.AsyncOpenAI(base_url=mine.base, api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match=reason):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        sdk = anthropic.AsyncAnthropic(base_url=mine.address, api_key=key, max_retries=0)
        with pytest.raises(anthropic.AuthenticationError, match=reason):
            await sdk.messages.create(model=MODEL, messages=MESSAGES, max_tokens=MOST)
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{mine.base}/chat/completions", json={"model": MODEL, "messages": MESSAGES})
    assert answer.status_code == 401 and "send it as" in answer.json()["error"]["message"]
    assert await mine.calls() == await other.calls() == []


async def test_no_control_route_answers_on_the_public_port(served: Served) -> None:
    session = await served.attempt()
    paths = closed_routes()
    assert len(paths) > 40 and {"/pause", "/collective_rpc", "/metrics", "/v1/load_lora_adapter"} <= set(paths)
    async with httpx.AsyncClient() as client:
        ways = [(served.root, session.headers), (session.address, session.headers), (served.root, served.operator())]
        for path in paths:
            asked = [client.request(m, root + path, headers=h) for root, h in ways for m in ("GET", "POST")]
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {404}, path
        for path in ("//pause", "/v1/../pause", "/v1/%2e%2e/pause", "/v1/models/../../pause", "/pause/", "/health/x"):
            answer = await client.send(client.build_request("POST", served.root + path, headers=session.headers))
            assert answer.status_code == 404, path


async def test_the_status_is_for_the_operator(served: Served) -> None:
    session = await served.attempt()
    address = f"{served.root}/status"
    async with httpx.AsyncClient() as client:
        assert (await client.get(address)).status_code == 401
        assert (await client.get(address, headers=session.headers)).status_code == 401
        told = (await client.get(address, headers=served.operator())).json()
    assert told["version"] == 0 and told["proved"] is True and told["swapping"] is False
    assert told["running"] == told["waiting"] == 0 and told["kv_cache_use"] == 0
    [swap] = told["swaps"]
    assert swap["version"] == 0 and swap["proved"] and swap["seconds"] > 0 and swap["max_logprob_diff"] < 1e-4


async def test_the_status_shows_how_busy_the_engine_is(served: Served) -> None:
    session = await served.attempt()
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 2.0, "ignore_eos": True, "max_tokens": 400}
    calls = [asyncio.create_task(session.post("/v1/chat/completions", body)) for _ in range(4)]
    most: dict[str, float] = {}
    async with httpx.AsyncClient() as client:
        while not all(call.done() for call in calls):
            told = (await client.get(f"{served.root}/status", headers=served.operator())).json()
            most = {name: max(most.get(name, 0), told[name]) for name in ("running", "kv_cache_use")}
    assert all(call.result().status_code == 200 for call in calls)
    assert most["running"] == 4 and 0 < most["kv_cache_use"] <= 1


async def test_http_is_not_spoken_beyond_this_machine(served: Served) -> None:
    """Ray's own gRPC is: that of every actor, and that by which Serve's handles call a replica."""
    [replica] = await served.cluster.replicas("describe")
    children = psutil.Process().children(recursive=True)
    [door, *_] = [process for process in children if process.name() == "haproxy"]
    assert listening(door) and not beyond(door)
    engine = psutil.Process(replica["pid"])
    assert listening(engine) and len(beyond(engine)) <= 2
    async with httpx.AsyncClient(timeout=5) as client:
        for port in beyond(engine):
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://127.0.0.1:{port}/health")


def listening(process: psutil.Process) -> list[Any]:
    """The addresses at which it waits for connections."""
    return [found.laddr for found in process.net_connections("inet") if found.status == psutil.CONN_LISTEN]


def beyond(process: psutil.Process) -> list[int]:
    """Its ports that others than this machine reach."""
    return [at.port for at in listening(process) if not at.ip.startswith("127.") and at.ip != "::1"]
