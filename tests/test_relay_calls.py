"""Calls through the relay to an upstream over real HTTP, with the real clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from openai import APIError
from starlette.responses import JSONResponse

from lightning_ray.capture.keys import operator_key
from lightning_ray.store.schema import read_spans, spans_to_batch
from tests.relay_parts import CHAT, COST, SECRET, Relayed, ask
from tests.relay_upstream import KEY, USAGE, WORDS, data


@pytest.fixture
async def relayed() -> AsyncIterator[Relayed]:
    made = Relayed()
    yield made
    await made.stop()


async def test_an_answer_and_its_span(relayed: Relayed) -> None:
    await relayed.start(model="big-model")
    answer = await relayed.client().chat.completions.create(**ask())
    assert answer.choices[0].message.content == "echo hi"
    row = await relayed.row()
    assert (row["rollout_id"], row["attempt_id"], row["status"]) == ("ro-1", "at-1", "OK")
    assert (row["name"], row["model"], row["finish_reason"]) == ("openai.chat.completion", "policy", "stop")
    assert "prompt_ids" not in row
    found = row["attributes"]
    assert found["request"] == ask() and found["response"] == answer.model_dump(exclude_unset=True)
    assert found["usage"] == {"prompt_tokens": 100, "completion_tokens": 20, "cached_tokens": 0}
    assert found["cost"] == pytest.approx(COST) and found["upstream"] == "judge"
    assert found["gen_ai.response.id"] == answer.id and found["gen_ai.response.model"] == "big-model-2026"
    assert 0 <= found["timing"]["queue"] <= found["timing"]["first_token"] <= found["timing"]["total"]
    [(url, headers, body)] = relayed.fake.requests
    assert url.endswith("/v1/chat/completions") and headers["authorization"] == f"Bearer {KEY}"
    assert body == {**ask(), "model": "big-model"}
    assert not any("lr1." in value or "lightning" in value for value in headers.values())


async def test_parameters_go_over_what_the_client_asks(relayed: Relayed) -> None:
    await relayed.start(parameters={"temperature": 0, "top_p": None})
    await relayed.client().chat.completions.create(**ask(temperature=0.7, top_p=0.5, max_tokens=3))
    [(_, _, body)] = relayed.fake.requests
    assert body == {**ask(), "temperature": 0, "max_tokens": 3}
    assert (await relayed.row())["attributes"]["request"]["temperature"] == 0.7, "what the client asked is kept"


async def test_token_ids_of_another_engine_stay_out_of_the_training_columns(relayed: Relayed) -> None:
    await relayed.start()
    await relayed.client().chat.completions.create(**ask(), extra_body={"return_token_ids": True})
    row = await relayed.row()
    assert row["attributes"]["response"]["prompt_token_ids"] == [1, 2, 3]
    batch = spans_to_batch([row])
    assert batch["prompt_ids"].null_count == batch["sampled_ids"].null_count == 1


async def test_the_body_goes_on_as_it_was_sent_if_nothing_has_to_change(relayed: Relayed) -> None:
    await relayed.start()
    async with relayed.http() as http:
        raw = b'{ "messages" : [{"role": "user", "content": "\\u00e4"}],  "model":"m" }'
        answer = await http.post(CHAT, content=raw, headers={"openai-beta": "x", "cookie": "c"})
    assert answer.status_code == 200
    [(_, headers, _)] = relayed.fake.requests
    assert headers["content-length"] == str(len(raw))
    assert headers["openai-beta"] == "x" and "cookie" not in headers


@pytest.mark.parametrize("cut", [None, 1, 7, 100_000])
async def test_streamed_bytes_are_the_upstreams(relayed: Relayed, cut: int | None) -> None:
    await relayed.start()
    body = ask(stream=True, stream_options={"include_usage": True}, cut_into=cut)
    async with relayed.http() as http:
        answer = await http.post(CHAT, json=body)
    assert answer.content == b"".join(relayed.fake.sent) and b"w\xc3\xb6rld" in answer.content
    assert answer.headers["content-type"].startswith("text/event-stream")
    row = await relayed.row()
    assert row["attributes"]["response"]["choices"][0]["message"]["content"] == "".join(WORDS) + "(echo hi)"
    assert row["attributes"]["response"]["usage"] == USAGE and row["status"] == "OK"


async def test_a_stream_comes_as_it_is_made(relayed: Relayed) -> None:
    await relayed.start()
    relayed.fake.pace = 0.2
    stream = await relayed.client().chat.completions.create(**ask(), stream=True)
    seen = []
    async for chunk in stream:
        seen.append((chunk.choices[0].delta.content, len(relayed.fake.sent)))
    assert [text for text, _ in seen] == [*WORDS, "(echo hi)", None]
    assert [sent for _, sent in seen] == [1, 2, 3, 4, 5], "each came before the next was sent"


async def test_the_usage_that_a_client_did_not_ask_for_is_counted_and_not_shown(relayed: Relayed) -> None:
    await relayed.start()
    stream = await relayed.client().chat.completions.create(**ask(), stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks)
    assert (await relayed.row())["attributes"]["cost"] == pytest.approx(COST)
    relayed.rows.clear()
    stream = await relayed.client().chat.completions.create(
        **ask(), stream=True, stream_options={"include_usage": True}
    )
    assert [chunk async for chunk in stream][-1].usage.total_tokens == 120  # type: ignore[union-attr]


async def test_without_asking_for_it_the_body_is_left_alone_and_the_gap_is_told(relayed: Relayed) -> None:
    await relayed.start(ask_for_usage=False)
    stream = await relayed.client().chat.completions.create(**ask(), stream=True)
    assert [chunk async for chunk in stream]
    assert relayed.fake.requests[0][2] == ask(stream=True)
    assert (await relayed.row())["status"] == "OK"
    assert (await relayed.app.status())["judge"]["without_usage"] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_span_is_there_before_the_answer_ends(relayed: Relayed, stream: bool) -> None:
    await relayed.start()
    relayed.store_delay = 0.2
    async with relayed.http() as http, http.stream("POST", CHAT, json=ask(stream=stream)) as answer:
        async for raw in answer.aiter_raw():
            if b"[DONE]" in raw or not stream:
                assert len(relayed.rows) == 1
    assert len(relayed.rows) == 1


async def test_responses(relayed: Relayed) -> None:
    await relayed.start()
    client = relayed.client()
    plain = await client.responses.create(model="m", input="hi")
    assert plain.output_text == "Hi"
    events = [event.type async for event in await client.responses.create(model="m", input="hi", stream=True)]
    assert events[-1] == "response.completed"
    assert [row["name"] for row in relayed.rows] == ["openai.response"] * 2
    for row in relayed.rows:
        assert (row["status"], row["finish_reason"]) == ("OK", "completed")
        assert row["attributes"]["usage"]["cached_tokens"] == 60


async def test_anthropics_client(relayed: Relayed) -> None:
    anthropic = pytest.importorskip("anthropic")
    await relayed.start()
    base = f"{relayed.address}/to/claude/rollout/ro-1/attempt/at-1"
    client = anthropic.AsyncAnthropic(base_url=base, api_key=relayed.key(upstream="claude"), max_retries=0)
    asked = {"model": "c", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
    answer = await client.messages.create(**asked)
    assert answer.content[0].text == "echo hi"
    async with client.messages.stream(**asked) as stream:
        assert "".join([text async for text in stream.text_stream]) == "".join(WORDS)
    for _, headers, _ in relayed.fake.requests:
        assert headers["x-api-key"] == KEY and "authorization" not in headers and headers["anthropic-version"]
    first, second = relayed.rows
    for row in (first, second):
        assert (row["name"], row["status"], row["finish_reason"]) == ("anthropic.message", "OK", "end_turn")
        assert row["attributes"]["usage"] == {"prompt_tokens": 100, "completion_tokens": 20, "cached_tokens": 60}
        assert row["attributes"]["cost"] == pytest.approx((40 * 2.0 + 20 * 10.0) / 1e6)
    assert second["attributes"]["response"]["content"] == [{"type": "text", "text": "".join(WORDS)}]


async def test_routes_that_sample_nothing_are_passed_and_paid(relayed: Relayed) -> None:
    await relayed.start()
    client = relayed.client()
    assert [model.id async for model in client.models.list()] == ["big-model-2026"]
    await client.embeddings.create(model="e", input="hi", encoding_format="float")
    assert not relayed.rows
    assert (await relayed.app.status())["judge"]["money"] == pytest.approx(1000 * 2.0 / 1e6)


async def test_an_error_of_the_upstream_is_the_clients_to_read(relayed: Relayed) -> None:
    await relayed.start()
    relayed.fake.plan = [JSONResponse({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400)]
    with pytest.raises(APIError, match="too long") as caught:
        await relayed.client().chat.completions.create(**ask())
    assert caught.value.code == "context_length_exceeded"
    row = await relayed.row()
    assert row["status"] == {"status_code": "ERROR", "description": "too long"}
    assert row["attributes"]["upstream_status"] == 400 and len(relayed.fake.requests) == 1


async def test_many_calls_at_once_are_not_mixed(relayed: Relayed) -> None:
    await relayed.start(max_concurrent=400)
    relayed.fake.delay = 0.5

    shared = relayed.client()

    async def one(index: int) -> None:
        attempt, text = f"at-{index}", f"task {index}"
        base = str(shared.base_url).replace("at-1", attempt)
        client = shared.with_options(base_url=base, api_key=relayed.key(attempt))
        if index % 2:
            answer = await client.chat.completions.create(**ask(text))
            assert answer.choices[0].message.content == f"echo {text}"
        else:
            stream = await client.chat.completions.create(**ask(text), stream=True)
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert said == "".join(WORDS) + f"(echo {text})"

    await asyncio.gather(*(one(index) for index in range(300)))
    assert relayed.fake.most_running > 100
    assert len(relayed.rows) == 300
    for row in relayed.rows:
        index = row["attempt_id"].removeprefix("at-")
        choice = row["attributes"]["response"]["choices"][0]
        assert f"echo task {index}" in choice["message"]["content"].replace(")", "").split("(")
        assert row["attributes"]["request"]["messages"][0]["content"] == f"task {index}"
    assert (await relayed.app.status())["judge"]["calls"] == 300


async def test_two_upstreams_by_name_and_the_status(relayed: Relayed) -> None:
    await relayed.start()
    async with relayed.http() as http:
        assert (await http.post(CHAT, json=ask())).status_code == 200
        asked = {"authorization": f"Bearer {relayed.key(upstream='claude')}"}
        claude = "/to/claude/rollout/ro-1/attempt/at-1/v1/messages"
        assert (await http.post(claude, json=ask(), headers=asked)).status_code == 200
        unknown = await http.post("/to/nobody/rollout/ro-1/attempt/at-1/v1/messages", json=ask())
        assert unknown.status_code == 404 and "/to/judge" in unknown.text
        assert (await http.get("/status")).status_code == 401
        operator = {"authorization": f"Bearer {operator_key(SECRET, 60)}"}
        status = (await http.get("/status", headers=operator)).json()
        alone = (await http.get("/to/judge/status", headers=operator)).json()
        assert (await http.get("/health")).status_code == 200
    assert set(status) == {"judge", "claude"} and alone == status["judge"]
    assert {**status["judge"], "money": None} == {
        "running": 0,
        "waiting": 0,
        "calls": 1,
        "errors": 0,
        "retries": 0,
        "prompt_tokens": 100,
        "cached_tokens": 0,
        "completion_tokens": 20,
        "without_usage": 0,
        "money": None,
        "max_spend": None,
    }
    assert status["claude"]["cached_tokens"] == 60
    assert [row["attributes"]["upstream"] for row in relayed.rows] == ["judge", "claude"]


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        (CHAT.replace("at-1", "at-2"), None, 401),
        (CHAT, KEY, 401),
        (CHAT, "x", 401),
        ("/to/judge/rollout/ro-1/attempt/at-1/v1/files", None, 404),
        ("/v1/chat/completions", None, 404),
    ],
)
async def test_only_the_attempts_key_opens_its_routes(
    relayed: Relayed, path: str, key: str | None, status: int
) -> None:
    await relayed.start()
    async with relayed.http() as http:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert (await http.post(path, json=ask(), headers=headers)).status_code == status
    assert not relayed.fake.requests and not relayed.rows


async def test_the_rows_are_spans(relayed: Relayed) -> None:
    await relayed.start()
    relayed.fake.plan = [JSONResponse({"error": {"message": "no"}}, 400)]
    async with relayed.http() as http:
        for _ in range(2):
            await http.post(CHAT, json=ask())
    failed, answered = read_spans(spans_to_batch(relayed.rows))
    assert (failed.status.status_code, failed.status.description) == ("ERROR", "no")
    assert answered.status.status_code == "OK" and answered.attributes["response"]["usage"] == USAGE
    assert json.dumps(answered.attributes["response"]) and data({})  # plain values only
