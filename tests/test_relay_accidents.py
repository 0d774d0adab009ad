"""What goes wrong between the relay and its upstream, what is tried again, and what never gets out."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import APIError, APIStatusError
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse

from lightning_ray.errors import ConfigError
from lightning_ray.net import free_port
from lightning_ray.relay import asking
from lightning_ray.relay.settings import Upstream
from lightning_ray.store.schema import spans_to_batch
from tests.relay_parts import CHAT, Relayed, ask
from tests.relay_upstream import KEY, WORDS


@pytest.fixture
async def relayed() -> AsyncIterator[Relayed]:
    made = Relayed()
    yield made
    await made.stop()


def limited(seconds: str) -> JSONResponse:
    return JSONResponse({"error": {"message": "slow down"}}, 429, {"retry-after": seconds})


def failed(status: int = 500) -> JSONResponse:
    return JSONResponse({"error": {"message": "oh no"}}, status)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_may_pass_is_tried_again_and_counts_once(relayed: Relayed, stream: bool) -> None:
    await relayed.start()
    relayed.fake.plan = [failed(), limited("0.3"), failed(529), "drop"]
    began = time.monotonic()
    answer: Any = await relayed.client().chat.completions.create(**ask(stream=stream))
    if stream:
        assert [chunk async for chunk in answer]
    assert time.monotonic() - began > 0.3
    assert len(relayed.fake.requests) == 5
    row = await relayed.row()
    assert row["status"] == "OK" and row["attributes"]["upstream_retries"] == 4
    status = (await relayed.app.status())["judge"]
    assert (status["calls"], status["retries"], status["errors"]) == (1, 4, 0)


async def test_the_last_error_is_passed_on_with_its_pause(relayed: Relayed) -> None:
    await relayed.start(retries=1)
    relayed.fake.plan = [failed(), limited("7")]
    with pytest.raises(APIStatusError, match="slow down") as caught:
        await relayed.client().chat.completions.create(**ask())
    assert caught.value.status_code == 429 and caught.value.response.headers["retry-after"] == "7"
    assert len(relayed.fake.requests) == 2
    assert (await relayed.row())["attributes"]["upstream_status"] == 429


@pytest.mark.parametrize("answer", [limited("500"), JSONResponse({}, 500, {"x-should-retry": "false"}), failed(404)])
async def test_what_another_try_would_not_change_is_not_tried(relayed: Relayed, answer: Any) -> None:
    await relayed.start()
    relayed.fake.plan = [answer]
    with pytest.raises(APIStatusError):
        await relayed.client().chat.completions.create(**ask())
    assert len(relayed.fake.requests) == 1


async def test_an_upstream_that_is_not_there(relayed: Relayed) -> None:
    await relayed.start(base_url=f"http://127.0.0.1:{free_port('127.0.0.1')}/v1", retries=1)
    with pytest.raises(APIStatusError, match="'judge' cannot be reached: ClientConnectorError") as caught:
        await relayed.client().chat.completions.create(**ask())
    assert caught.value.status_code == 502
    row = await relayed.row()
    assert row["status"]["status_code"] == "ERROR" and "cannot be reached" in row["status"]["description"]


async def test_silence_is_no_reason_to_pay_twice(relayed: Relayed) -> None:
    await relayed.start(timeout_seconds=0.3)
    relayed.fake.delay = 2.0
    with pytest.raises(APIStatusError, match=r"silent for 0\.3 s") as caught:
        await relayed.client().chat.completions.create(**ask())
    assert caught.value.status_code == 504 and len(relayed.fake.requests) == 1


async def test_an_answer_may_take_longer_than_a_silence(relayed: Relayed) -> None:
    await relayed.start(timeout_seconds=2.0)
    relayed.fake.pace = 0.5
    stream = await relayed.client().chat.completions.create(**ask(stream=True))
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]).startswith("".join(WORDS))


@pytest.mark.parametrize("pause", [0.0, 0.1])
async def test_a_stream_that_breaks_off_is_an_error_and_not_tried_again(relayed: Relayed, pause: float) -> None:
    await relayed.start()
    relayed.fake.pace = pause
    stream = await relayed.client().chat.completions.create(**ask(stream=True), extra_body={"drop_after": 2})
    said = []
    with pytest.raises(APIError, match="broke off"):
        async for chunk in stream:
            said.append(chunk.choices[0].delta.content)
    assert said == WORDS[:2] and len(relayed.fake.requests) == 1
    row = await relayed.row()
    assert row["status"]["status_code"] == "ERROR" and "broke off" in row["status"]["description"]
    assert row["attributes"]["response"]["choices"][0]["message"]["content"] == "".join(WORDS[:2])
    assert "hung_up" not in row["attributes"]
    assert (await relayed.app.status())["judge"]["without_usage"] == 1


async def test_anthropics_client_meets_a_broken_stream_too(relayed: Relayed) -> None:
    anthropic = pytest.importorskip("anthropic")
    await relayed.start()
    base = f"{relayed.address}/to/claude/rollout/ro-1/attempt/at-1"
    client = anthropic.AsyncAnthropic(base_url=base, api_key=relayed.key(upstream="claude"), max_retries=0)
    asked = {"model": "c", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(anthropic.APIError, match="broke off"):
        async for _ in await client.messages.create(**asked, stream=True, extra_body={"drop_after": 4}):
            pass
    assert (await relayed.row())["status"]["status_code"] == "ERROR"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_ends_the_upstreams_call(relayed: Relayed, stream: bool) -> None:
    await relayed.start()
    relayed.fake.pace, relayed.fake.delay = 0.2, 0.0 if stream else 20.0
    async with relayed.http() as http:
        if stream:
            async with http.stream("POST", CHAT, json=ask(stream=True)) as answer:
                async for _ in answer.aiter_raw():
                    break
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(http.post(CHAT, json=ask()), 0.5)
    row = await relayed.row()
    assert row["attributes"]["hung_up"] and row["status"]["status_code"] == "ERROR"
    for _ in range(100):
        if relayed.fake.cancelled or not relayed.fake.running:
            break
        await asyncio.sleep(0.02)
    assert len(relayed.fake.sent) < 3
    status = (await relayed.app.status())["judge"]
    assert (status["running"], status["calls"]) == (0, 1)


async def test_retries_of_the_clients_sdk_count_once(relayed: Relayed) -> None:
    await relayed.start(retries=0)
    relayed.fake.plan = [failed()]
    await relayed.client(max_retries=1).chat.completions.create(**ask())
    assert [row["name"] for row in relayed.rows].count("openai.chat.completion") == 2
    [superseded] = [row for row in relayed.rows if row["name"] == "lightning_ray.superseded"]
    assert superseded["parent_id"] == relayed.rows[0]["span_id"]


async def test_calls_at_once_are_bounded_and_the_others_wait(relayed: Relayed) -> None:
    await relayed.start(max_concurrent=3)
    relayed.fake.delay = 0.1
    client = relayed.client()
    asked = asyncio.gather(*(client.chat.completions.create(**ask(str(index))) for index in range(12)))
    waited = 0
    while not asked.done():
        waited = max(waited, (await relayed.app.status())["judge"]["waiting"])
        await asyncio.sleep(0.01)
    assert relayed.fake.most_running == 3 and waited > 3
    assert max(row["attributes"]["timing"]["queue"] for row in relayed.rows) > 0.2


async def test_who_waits_too_long_is_told(relayed: Relayed) -> None:
    await relayed.start(max_concurrent=1, wait_seconds=0.2)
    relayed.fake.delay = 1.0
    client = relayed.client()
    first = asyncio.create_task(client.chat.completions.create(**ask()))
    await asyncio.sleep(0.2)
    with pytest.raises(APIStatusError, match="no place within its limits") as caught:
        await client.chat.completions.create(**ask())
    assert caught.value.status_code == 429 and caught.value.response.headers["retry-after"]
    await first


async def test_a_spend_that_is_reached_ends_the_calls(relayed: Relayed) -> None:
    await relayed.start(max_spend=0.0005)
    client = relayed.client()
    for _ in range(2):
        await client.chat.completions.create(**ask())
    with pytest.raises(APIStatusError, match=r"'judge' has cost 0\.0008, and may cost 0\.0005") as caught:
        await client.chat.completions.create(**ask())
    assert caught.value.status_code == 402 and len(relayed.fake.requests) == 2
    assert relayed.rows[-1]["status"]["status_code"] == "ERROR"


# What never gets out


def whole(relayed: Relayed) -> str:
    """Everything that was stored, in the clear."""
    spans_to_batch(relayed.rows)
    return repr(relayed.rows)


async def test_the_key_is_in_no_answer_and_no_span(relayed: Relayed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await relayed.start(headers={"x-team": "team-secret-42"})
    seen = []
    async with relayed.http() as http:
        for body in (ask(leak=True), ask(leak=True, stream=True), ask(leak=True, stream=True, cut_into=3)):
            answer = await http.post(CHAT, json=body)
            assert answer.status_code == 200 and "*" * len(KEY) in answer.text
            seen.append(answer.text + repr(answer.headers))
        relayed.fake.plan = [PlainTextResponse(f"no: {KEY}", 400), RedirectResponse(f"http://x/?key={KEY}")]
        for status in (400, 502):
            answer = await http.post(CHAT, json=ask())
            assert answer.status_code == status
            seen.append(answer.text + repr(answer.headers))
    everything = whole(relayed) + "".join(seen) + caplog.text + repr(await relayed.app.status())
    assert len(relayed.rows) == 5 and "x-debug" not in everything
    for secret in (KEY, "team-secret-42"):
        assert secret not in everything


async def test_a_key_that_is_refused_is_the_relays_own_matter(relayed: Relayed) -> None:
    await relayed.start(api_key="sk-wrong-key-0123456789")
    with pytest.raises(APIStatusError, match=r"refused the relay's own key \(401\)") as caught:
        await relayed.client().chat.completions.create(**ask())
    assert caught.value.status_code == 502
    assert "sk-wrong" not in caught.value.response.text + whole(relayed)


def test_settings_show_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream(base_url="http://x/v1", api_key=KEY, headers={"x-team": "team-secret-42"})  # type: ignore[arg-type, dict-item]
    monkeypatch.setenv("JUDGE_KEY", KEY)
    resolved = Upstream(base_url="http://x/v1", api_key_env="JUDGE_KEY").with_key()
    for shown in (upstream, resolved):
        assert shown.own_headers()["authorization"] == f"Bearer {KEY}"
        assert not any(secret in f"{shown!r}{shown}{shown.model_dump_json()}" for secret in (KEY, "team-secret-42"))
    with pytest.raises(ValueError) as caught:
        Upstream(base_url="http://x/v1", api_key=KEY, api_key_env="A")  # type: ignore[arg-type]
    with pytest.raises(ValueError) as again:
        Upstream(base_url="http://x/v1", api_key=KEY + "\n\x00")  # type: ignore[arg-type]
    assert KEY not in str(caught.value) + str(again.value)


def test_a_key_that_is_not_there_is_named() -> None:
    assert "NO_SUCH_KEY" not in os.environ
    with pytest.raises(ConfigError, match="api_key_env='NO_SUCH_KEY'"):
        Upstream(base_url="http://x/v1", api_key_env="NO_SUCH_KEY").own_headers()


def test_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert asking.proxy_for("https://api.example/v1") == "http://proxy:3128"
    assert asking.proxy_for("https://inside.example/v1") is None
