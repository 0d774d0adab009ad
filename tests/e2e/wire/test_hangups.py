"""Clients that hang up, read slowly, send nonsense, or send again: what is stored, and what counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest

from lightning_ray.semconv import SUPERSEDED_SPAN
from tests.e2e.wire.clients import MESSAGES, MOST, PROMPT
from tests.e2e.wire.lossy import Fault, lossy
from tests.e2e.wire.served import BODY_MB, MODEL, Served, Session
from tests.e2e.wire.test_turns import trajectories

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]
LONG: dict[str, Any] = {"temperature": 2.0, "max_tokens": 480}
"""Of an answer that takes seconds."""
ENDLESS: dict[str, Any] = {"ignore_eos": True}
BODY = {"model": MODEL, "messages": MESSAGES, **LONG, **ENDLESS}
STREAMED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 480},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 480},
    "/v1/responses": {"input": "paris", "max_output_tokens": 480},
    "/v1/messages": {"messages": MESSAGES[-1:], "max_tokens": 480},
}
SOON = 5.0


async def until(what: Callable[[], Awaitable[Any]]) -> Any:
    """What it gives, as soon as it gives something."""
    async with asyncio.timeout(SOON):
        while not (found := await what()):
            await asyncio.sleep(0.02)
        return found


async def load(served: Served) -> tuple[int, int]:
    """How many sequences the engine samples, and how many wait."""
    async with httpx.AsyncClient() as client:
        told = (await client.get(f"{served.root}/status", headers=served.operator())).json()
    return told["running"], told["waiting"]


async def idle(served: Served) -> bool:
    """Whether the engine has nothing to do."""
    return await load(served) == (0, 0)


async def busy(served: Served) -> bool:
    """Whether the engine is sampling."""
    return (await load(served))[0] > 0


async def check_broken_off(session: Session) -> None:
    """One span, of what was sampled until the client hung up, which trains nothing; and the engine stops."""
    await until(lambda: idle(session.served))
    [span] = await until(session.calls)
    assert 0 < len(span["sampled_ids"]) < LONG["max_tokens"]
    assert len(span["sampled_ids"]) == len(span["logprobs"]) == len(span["weight_versions"])
    assert span["attributes"]["hung_up"] is True and span["status"] == "ERROR"
    assert await trajectories(session) == []


@pytest.mark.parametrize("path", STREAMED)
async def test_a_stream_that_is_left_in_the_middle_is_stored_as_far_as_it_came(served: Served, path: str) -> None:
    session = await served.attempt()
    body = {"model": MODEL, **STREAMED[path], "temperature": 2.0, **ENDLESS, "stream": True}
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", session.address + path, json=body, headers=session.headers) as answer,
    ):
        lines = answer.aiter_lines()
        while "delta" not in (line := await anext(lines)) and '"text":"' not in line:
            pass
    await check_broken_off(session)


async def test_a_call_that_is_given_up_before_its_answer_is_stored_as_far_as_it_came(served: Served) -> None:
    session = await served.attempt()
    call = asyncio.create_task(session.post("/v1/chat/completions", BODY))
    await until(lambda: busy(served))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await check_broken_off(session)


async def test_a_slow_reader_gets_everything_and_holds_nobody_up(served: Served) -> None:
    slow, quick = await served.attempt(), await served.attempt()
    body = BODY | {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20, "return_token_ids": True}
    read, heard = 0, b""
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{slow.base}/chat/completions", json=body, headers=slow.headers) as answer,
    ):
        async for chunk in answer.aiter_raw(4096):
            heard += chunk
            read += 1
            if read == 2:
                for _ in range(3):
                    assert (await quick.post("/v1/chat/completions", BODY | {"max_tokens": 9})).status_code == 200
                await asyncio.sleep(1.5)
    events = heard.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and len(heard) > 2**20
    ids: dict[int, list[int]] = {}
    for event in events[:-2]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            ids.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
    calls = await slow.calls()
    assert sorted(call["sampled_ids"] for call in calls) == sorted(ids.values())
    assert all(call["status"] == "OK" and "hung_up" not in call["attributes"] for call in calls)
    assert len(await quick.calls()) == 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_nonsense_is_refused_in_the_words_of_its_api(served: Served, path: str) -> None:
    session = await served.attempt()
    large = json.dumps({"model": MODEL, "messages": "a" * (BODY_MB * 2**20)}).encode()
    cases = [(b'{"model": ', 400, "not JSON"), (b"[1]", 400, "JSON object"), (b"", 400, "not JSON"), (b"\xff", 400, "")]
    for raw, status, reason in [*cases, (large, 413, "larger than")]:
        answer = await session.post(path, raw)
        assert answer.status_code == status, answer.text
        told = answer.json()
        assert reason in told["error"]["message"] and told["error"]["type"]
        assert (told.get("type") == "error") == (path == "/v1/messages")
    assert await session.spans() == []


async def again_openai(session: Session, fault: Fault) -> int:
    transport = lossy(httpx, fault)
    async with httpx.AsyncClient(transport=transport, timeout=60) as http:
        client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key, http_client=http)
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, **LONG, extra_body=ENDLESS)
    return transport.tries


async def again_anthropic(session: Session, fault: Fault) -> int:
    transport = lossy(httpx2, fault)
    async with httpx2.AsyncClient(transport=transport, timeout=60) as http:
        client = anthropic.AsyncAnthropic(base_url=session.address, api_key=session.key, http_client=http)
        await client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=MOST)
    return transport.tries


@pytest.mark.parametrize("call", [again_openai, again_anthropic])
async def test_a_call_whose_answer_was_lost_and_that_its_sdk_sends_again_counts_once(
    served: Served, call: Callable[[Session, Fault], Awaitable[int]]
) -> None:
    session = await served.attempt()
    assert await call(session, "lost") == 2
    first, second = await session.calls()
    assert first["status"] == second["status"] == "OK" and second["attributes"]["retry"] == 1
    gone = [span for span in await session.spans() if span["name"] == SUPERSEDED_SPAN]
    assert [span["parent_id"] for span in gone] == [first["span_id"]]
    [trajectory] = await trajectories(session)
    assert trajectory.token_ids[trajectory.mask == 1].tolist() == second["sampled_ids"]


async def test_a_call_that_took_too_long_and_that_its_sdk_sends_again_counts_once(served: Served) -> None:
    session = await served.attempt()
    assert await again_openai(session, "impatient") == 2
    [trajectory] = await trajectories(session)
    last = (await session.calls())[-1]
    assert last["status"] == "OK" and last["attributes"]["retry"] == 1
    assert trajectory.token_ids[trajectory.mask == 1].tolist() == last["sampled_ids"]


async def test_equal_calls_that_are_no_retries_count_each(served: Served) -> None:
    session = await served.attempt()
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    for _ in range(3):
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=2.0, max_tokens=MOST)
    assert len(await trajectories(session)) == 3
