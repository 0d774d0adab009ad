"""Calls of the Anthropic client, against a stub of its server, in the words of every model call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.instrumentation import instrument_anthropic, instrument_clients, uninstrument_anthropic
from lightning_ray.instrumentation.anthropic import AnthropicStream
from lightning_ray.instrumentation.openai import uninstrument_openai
from lightning_ray.tracing import AttemptTrace, traced

anthropic = pytest.importorskip("anthropic")
try:
    import httpx2 as httpx  # the client's own, in newer versions
except ImportError:
    import httpx  # type: ignore[no-redef]

TOOL = {"type": "tool_use", "id": "t-1", "name": "look", "input": {"at": 1}}
MESSAGE: dict[str, Any] = {
    "id": "msg-1",
    "type": "message",
    "role": "assistant",
    "model": "served",
    "content": [{"type": "text", "text": "Looking."}, TOOL],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 2, "output_tokens": 3},
}
EVENTS: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {**MESSAGE, "content": [], "stop_reason": None, "usage": {"input_tokens": 2, "output_tokens": 0}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Look"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ing."}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {**TOOL, "input": {}}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"at"'}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": ": 1}"}},
    {"type": "content_block_stop", "index": 1},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 3},
    },
    {"type": "message_stop"},
]
ANSWERED = {
    "gen_ai.response.id": "msg-1",
    "gen_ai.response.model": "served",
    "gen_ai.response.finish_reason": "tool_use",
    "gen_ai.completion.0.role": "assistant",
    "gen_ai.completion.0.content": "Looking.",
    "gen_ai.completion.0.finish_reason": "tool_use",
    "gen_ai.completion.0.tool_calls.0.id": "t-1",
    "gen_ai.completion.0.tool_calls.0.type": "function",
    "gen_ai.completion.0.tool_calls.0.name": "look",
    "gen_ai.completion.0.tool_calls.0.arguments": '{"at": 1}',
    "gen_ai.usage.prompt_tokens": 2,
    "gen_ai.usage.completion_tokens": 3,
    "gen_ai.usage.total_tokens": 5,
}
REQUEST: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "system": "Be brief.",
    "messages": [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [TOOL]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t-1", "content": "seen"}]},
    ],
    "tools": [{"name": "look", "input_schema": {"type": "object"}}],
}


@pytest.fixture
def asked() -> list[Any]:
    return []


@pytest.fixture
def answer(asked: list[Any]) -> Any:
    def answer(request: Any) -> Any:
        asked.append(request)
        if not json.loads(request.content).get("stream"):
            return httpx.Response(200, json=MESSAGE)
        lines = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in EVENTS]
        return httpx.Response(200, content="".join(lines).encode(), headers={"content-type": "text/event-stream"})

    return answer


@pytest.fixture
def client(answer: Any) -> Any:
    http = httpx.Client(transport=httpx.MockTransport(answer))
    return anthropic.Anthropic(api_key="k", base_url="http://x", http_client=http)


@pytest.fixture
def trace() -> Iterator[AttemptTrace]:
    instrument_anthropic()
    with traced(AttemptTrace("ro-1", "at-1")) as trace:
        yield trace
    uninstrument_anthropic()


def calls(trace: AttemptTrace) -> list[dict[str, Any]]:
    return [span["attributes"] for span in trace.spans if span["name"] == "anthropic.message"]


def test_a_message(client: Any, trace: AttemptTrace) -> None:
    assert client.messages.create(**REQUEST).id == "msg-1"
    [attributes] = calls(trace)
    asked = {key: value for key, value in attributes.items() if key not in ANSWERED}
    assert {key: attributes[key] for key in ANSWERED} == ANSWERED
    assert asked["gen_ai.request.model"] == "m" and asked["gen_ai.request.max_tokens"] == 9
    assert asked["gen_ai.prompt.0.role"] == "system" and asked["gen_ai.prompt.1.content"] == "Look."
    assert asked["gen_ai.prompt.2.tool_calls.0.arguments"] == '{"at": 1}'
    assert json.loads(asked["gen_ai.prompt.3.content"])[0]["content"] == "seen"
    assert asked["gen_ai.request.functions.0.parameters"] == '{"type": "object"}'


async def test_an_async_message_and_a_raw_one(client: Any, answer: Any, trace: AttemptTrace) -> None:
    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    later = anthropic.AsyncAnthropic(api_key="k", base_url="http://x", http_client=http)
    await later.messages.create(**REQUEST)
    assert client.messages.with_raw_response.create(**REQUEST).parse().id == "msg-1"
    raw = await later.messages.with_raw_response.create(**REQUEST)
    parsed = raw.parse()
    assert (await parsed if inspect.isawaitable(parsed) else parsed).id == "msg-1"
    assert [attributes["gen_ai.response.id"] for attributes in calls(trace)] == ["msg-1"] * 3


async def test_streams(client: Any, answer: Any, trace: AttemptTrace) -> None:
    for _ in client.messages.create(**REQUEST, stream=True):
        pass
    with client.messages.stream(**REQUEST) as stream:
        assert stream.get_final_text() == "Looking."
    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    later = anthropic.AsyncAnthropic(api_key="k", base_url="http://x", http_client=http)
    async for _ in await later.messages.create(**REQUEST, stream=True):
        pass
    for attributes in calls(trace):
        assert {key: attributes[key] for key in ANSWERED} == ANSWERED
    assert len(calls(trace)) == 3


def test_a_message_is_of_the_agent_at_work(client: Any, asked: list[Any], trace: AttemptTrace) -> None:
    with lr.operation(**{"agent.name": "planner"}):
        client.messages.create(**REQUEST)
    assert asked[0].headers["x-lightning-agent"] == "planner"
    assert calls(trace)[0]["gen_ai.agent.name"] == "planner"


def test_an_unfinished_tool_input_is_kept_as_it_came() -> None:
    streamed = AnthropicStream("messages")
    for event in EVENTS[:7]:
        streamed.add(event)
    assert streamed.answer["content"][1]["input"] == '{"at"'


def test_all_clients_at_once(client: Any, trace: AttemptTrace) -> None:
    instrument_clients()
    try:
        client.messages.create(**REQUEST)
    finally:
        uninstrument_openai()
    assert len(calls(trace)) == 1
