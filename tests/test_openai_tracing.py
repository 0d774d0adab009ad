"""Calls of the OpenAI client, against a stub of its server: spans named and said as Agent Lightning 0.3 does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import lightning_ray as lr
from lightning_ray.adapters.triplets import TracerTraceToTriplet
from lightning_ray.instrumentation import instrument_openai, uninstrument_openai
from lightning_ray.tracing import AttemptTrace, traced

try:
    import httpx2 as httpx  # the client's own, in newer versions
except ImportError:
    import httpx  # type: ignore[no-redef]

CALL = {"id": "c-1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "served",
    "prompt_token_ids": [1, 2],
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "token_ids": [3],
            "logprobs": {"content": [{"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": []}]},
            "message": {"role": "assistant", "content": "Looking.", "tool_calls": [CALL]},
        }
    ],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
}
TEXT = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "served",
    "choices": [{"index": 0, "finish_reason": "stop", "text": "done", "logprobs": None}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
}
RESPONSE: dict[str, Any] = {
    "id": "resp-1",
    "object": "response",
    "created_at": 1,
    "model": "served",
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "temperature": 1.0,
    "top_p": 1.0,
    "output": [
        {
            "type": "message",
            "id": "m-1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "done", "annotations": []}],
        },
        {"type": "function_call", "id": "f-1", "call_id": "c-1", "name": "look", "arguments": "{}"},
    ],
    "usage": {
        "input_tokens": 2,
        "output_tokens": 1,
        "total_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    },
}


def delta(index: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    chunk: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "served"}
    return {**chunk, "choices": [{"index": index, "delta": fields, "finish_reason": finish}]}


CHUNKS = [
    delta(role="assistant", content="Look"),
    delta(content="ing."),
    delta(tool_calls=[{"index": 0, "id": "c-1", "type": "function", "function": {"name": "look", "arguments": ""}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": '{"at"'}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}], finish="tool_calls"),
    {**delta(), "choices": [], "usage": CHAT["usage"]},
]
EVENTS = [
    {"type": "response.created", "sequence_number": 0, "response": {**RESPONSE, "status": "in_progress", "output": []}},
    {"type": "response.completed", "sequence_number": 1, "response": RESPONSE},
]


def events(chunks: list[dict[str, Any]], done: bool = True) -> bytes:
    named = [f"event: {chunk['type']}\n" if "type" in chunk else "" for chunk in chunks]
    lines = [f"{name}data: {json.dumps(chunk)}\n\n" for name, chunk in zip(named, chunks, strict=True)]
    return ("".join(lines) + "data: [DONE]\n\n" * done).encode()


class Stub:
    """The server: answers by path, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, request: Any) -> Any:
        self.asked.append(request)
        body = json.loads(request.content)
        if body["model"] == "broken":
            return httpx.Response(400, json={"error": {"message": "no such model"}})
        streamed = {"/v1/chat/completions": CHUNKS, "/v1/responses": EVENTS}
        whole = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/responses": RESPONSE}
        if body.get("stream"):
            headers = {"content-type": "text/event-stream"}
            return httpx.Response(200, content=events(streamed[request.url.path]), headers=headers)
        return httpx.Response(200, json=whole[request.url.path])


@pytest.fixture(autouse=True)
def instrumented() -> Iterator[None]:
    instrument_openai()
    yield
    uninstrument_openai()


@pytest.fixture
def trace() -> Iterator[AttemptTrace]:
    with traced(AttemptTrace("ro-1", "at-1")) as trace:
        yield trace


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def client(stub: Stub) -> openai.OpenAI:
    transport: Any = httpx.MockTransport(stub)
    return openai.OpenAI(
        api_key="k", base_url="http://x/v1", max_retries=0, http_client=httpx.Client(transport=transport)
    )


@pytest.fixture
def async_client(stub: Stub) -> openai.AsyncOpenAI:
    transport: Any = httpx.MockTransport(stub)
    http: Any = httpx.AsyncClient(transport=transport)
    return openai.AsyncOpenAI(api_key="k", base_url="http://x/v1", max_retries=0, http_client=http)


MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Look."}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c-1", "content": "seen"},
]
TOOLS: Any = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
ASKED = {
    "gen_ai.system": "OpenAI",
    "gen_ai.request.model": "m",
    "gen_ai.request.temperature": 0.5,
    "gen_ai.request.max_tokens": 9,
    "gen_ai.prompt.0.role": "system",
    "gen_ai.prompt.0.content": "Be brief.",
    "gen_ai.prompt.1.role": "user",
    "gen_ai.prompt.1.content": '[{"type": "text", "text": "Look."}]',
    "gen_ai.prompt.2.role": "assistant",
    "gen_ai.prompt.2.tool_calls.0.id": "c-1",
    "gen_ai.prompt.2.tool_calls.0.type": "function",
    "gen_ai.prompt.2.tool_calls.0.name": "look",
    "gen_ai.prompt.2.tool_calls.0.arguments": '{"at": 1}',
    "gen_ai.prompt.3.role": "tool",
    "gen_ai.prompt.3.content": "seen",
    "gen_ai.prompt.3.tool_call_id": "c-1",
    "gen_ai.request.functions.0.name": "look",
    "gen_ai.request.functions.0.description": "d",
    "gen_ai.request.functions.0.parameters": '{"type": "object"}',
}
ANSWERED = {
    "gen_ai.response.id": "chatcmpl-1",
    "gen_ai.response.model": "served",
    "gen_ai.response.finish_reason": "tool_calls",
    "gen_ai.completion.0.role": "assistant",
    "gen_ai.completion.0.content": "Looking.",
    "gen_ai.completion.0.finish_reason": "tool_calls",
    "gen_ai.completion.0.tool_calls.0.id": "c-1",
    "gen_ai.completion.0.tool_calls.0.type": "function",
    "gen_ai.completion.0.tool_calls.0.name": "look",
    "gen_ai.completion.0.tool_calls.0.arguments": '{"at": 1}',
    "gen_ai.usage.prompt_tokens": 2,
    "gen_ai.usage.completion_tokens": 1,
    "gen_ai.usage.total_tokens": 3,
}
IDS = {
    "prompt_token_ids": [1, 2],
    "response_token_ids": [3],
    "logprobs.content": '[{"token": "x", "bytes": null, "logprob": -0.5, "top_logprobs": []}]',
}
REQUEST: Any = {"model": "m", "messages": MESSAGES, "tools": TOOLS, "temperature": 0.5, "max_completion_tokens": 9}


def only(trace: AttemptTrace) -> dict[str, Any]:
    [span] = trace.spans
    assert span["name"] == "openai.chat.completion" and span["end_time"] >= span["start_time"]
    return span["attributes"]


def test_a_chat_completion(client: openai.OpenAI, trace: AttemptTrace) -> None:
    assert client.chat.completions.create(**REQUEST).choices[0].message.content == "Looking."
    assert only(trace) == {**ASKED, **ANSWERED, **IDS, "gen_ai.request.streaming": False}
    assert trace.spans[0]["status"]["status_code"] == "OK"


async def test_an_async_chat_completion(async_client: openai.AsyncOpenAI, trace: AttemptTrace) -> None:
    assert (await async_client.chat.completions.create(**REQUEST)).id == "chatcmpl-1"
    assert only(trace) == {**ASKED, **ANSWERED, **IDS, "gen_ai.request.streaming": False}


def test_a_raw_response_as_langchain_and_litellm_ask_for(client: openai.OpenAI, trace: AttemptTrace) -> None:
    raw = client.chat.completions.with_raw_response.create(**REQUEST)
    assert raw.parse().id == "chatcmpl-1" and raw.headers["content-type"] == "application/json"
    assert only(trace) == {**ASKED, **ANSWERED, **IDS, "gen_ai.request.streaming": False}


def test_a_parsed_answer(client: openai.OpenAI, trace: AttemptTrace) -> None:
    client.chat.completions.parse(model="m", messages=MESSAGES)
    assert only(trace)["gen_ai.response.id"] == "chatcmpl-1"


def test_a_stream(client: openai.OpenAI, trace: AttemptTrace) -> None:
    stream = client.chat.completions.create(**REQUEST, stream=True)
    assert trace.spans == [] and "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == "Looking."
    assert only(trace) == {**ASKED, **ANSWERED, "gen_ai.request.streaming": True}


async def test_an_async_stream(async_client: openai.AsyncOpenAI, trace: AttemptTrace) -> None:
    async for _ in await async_client.chat.completions.create(**REQUEST, stream=True):
        pass
    assert only(trace) == {**ASKED, **ANSWERED, "gen_ai.request.streaming": True}


def test_a_raw_stream(client: openai.OpenAI, trace: AttemptTrace) -> None:
    for _ in client.chat.completions.with_raw_response.create(**REQUEST, stream=True).parse():
        pass
    assert only(trace) == {**ASKED, **ANSWERED, "gen_ai.request.streaming": True}


def test_the_clients_own_stream_helper(client: openai.OpenAI, trace: AttemptTrace) -> None:
    with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Looking."
    assert only(trace)["gen_ai.completion.0.content"] == "Looking."


async def test_a_stream_that_its_reader_leaves(
    client: openai.OpenAI, async_client: openai.AsyncOpenAI, trace: AttemptTrace
) -> None:
    with client.chat.completions.create(**REQUEST, stream=True) as stream:
        next(stream)
    async with await async_client.chat.completions.create(**REQUEST, stream=True) as left:
        await left.__anext__()
    assert [span["attributes"]["gen_ai.completion.0.content"] for span in trace.spans] == ["Look", "Look"]


def test_a_response_that_is_the_callers_bytes(client: openai.OpenAI, trace: AttemptTrace) -> None:
    with client.chat.completions.with_streaming_response.create(**REQUEST) as response:
        assert b"Looking" in response.read()
    assert only(trace) == {**ASKED, "gen_ai.request.streaming": False}


def test_a_text_completion(client: openai.OpenAI, trace: AttemptTrace) -> None:
    client.completions.create(model="m", prompt="Say")
    [span] = trace.spans
    assert span["name"] == "openai.completion"
    assert span["attributes"]["gen_ai.prompt.0.content"] == "Say"
    assert span["attributes"]["gen_ai.completion.0.content"] == "done"


def test_a_response(client: openai.OpenAI, trace: AttemptTrace) -> None:
    given: Any = [
        {"role": "user", "content": "Look."},
        {"type": "function_call", "call_id": "c-0", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c-0", "output": "seen"},
        {"type": "item_reference", "id": "i"},
    ]
    tools: Any = [{"type": "function", "name": "look", "parameters": {}, "strict": True}]
    client.responses.create(model="m", instructions="Be brief.", input=given, tools=tools, max_output_tokens=9)
    with client.responses.create(model="m", input="Look.", stream=True) as stream:
        assert [event.type for event in stream] == ["response.created", "response.completed"]
    whole, streamed = trace.spans
    assert whole["name"] == streamed["name"] == "openai.response"
    attributes = whole["attributes"]
    assert [attributes[f"gen_ai.prompt.{i}.role"] for i in range(5)] == [
        "system",
        "user",
        "assistant",
        "tool",
        "item_reference",
    ]
    assert attributes["gen_ai.prompt.2.tool_calls.0.name"] == "look" and attributes["gen_ai.prompt.3.content"] == "seen"
    assert attributes["gen_ai.request.functions.0.name"] == "look" and attributes["gen_ai.request.max_tokens"] == 9
    for span in (whole, streamed):
        assert span["attributes"]["gen_ai.response.id"] == "resp-1"
        assert span["attributes"]["gen_ai.completion.0.content"] == "done"
        assert span["attributes"]["gen_ai.completion.0.tool_calls.0.id"] == "c-1"
        assert span["attributes"]["gen_ai.usage.prompt_tokens"] == 2
    assert streamed["attributes"]["gen_ai.prompt.0.content"] == "Look."


async def test_a_call_that_fails(client: openai.OpenAI, async_client: openai.AsyncOpenAI, trace: AttemptTrace) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="broken", messages=[])
    with pytest.raises(openai.BadRequestError):
        await async_client.chat.completions.create(model="broken", messages=[])
    for span in trace.spans:
        assert span["status"]["status_code"] == "ERROR" and "no such model" in span["status"]["description"]
        assert span["attributes"]["exception.type"] == "BadRequestError"
    assert len(trace.spans) == 2


def test_a_stream_that_breaks(trace: AttemptTrace) -> None:
    def cut(request: Any) -> Any:
        def pieces() -> Iterator[bytes]:
            yield events(CHUNKS[:1], done=False)
            raise httpx.ReadError("gone")

        return httpx.Response(200, content=pieces(), headers={"content-type": "text/event-stream"})

    transport: Any = httpx.MockTransport(cut)
    client = openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=httpx.Client(transport=transport))
    with pytest.raises((openai.APIError, httpx.ReadError)):
        list(client.chat.completions.create(**REQUEST, stream=True))
    assert only(trace)["gen_ai.completion.0.content"] == "Look"
    assert trace.spans[0]["status"]["status_code"] == "ERROR"


def test_answers_in_unknown_shapes_reach_the_caller(trace: AttemptTrace) -> None:
    def odd(request: Any) -> Any:
        return httpx.Response(200, json={"choices": [{"message": "what?"}], "usage": 3})

    transport: Any = httpx.MockTransport(odd)
    client = openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=httpx.Client(transport=transport))
    assert client.chat.completions.create(**REQUEST).choices
    assert only(trace)["gen_ai.request.model"] == "m"


def test_a_call_says_which_span_it_comes_from(client: openai.OpenAI, stub: Stub) -> None:
    client.chat.completions.create(**REQUEST)
    with traced(AttemptTrace("r", "a")) as trace:
        client.chat.completions.create(**REQUEST)
        client.chat.completions.create(**REQUEST, extra_headers={"TraceParent": "00-mine"})
    told = [request.headers.get("traceparent") for request in stub.asked]
    assert told == [None, f"00-{trace.trace_id}-{trace.spans[0]['span_id']}-01", "00-mine"]


def test_a_call_is_made_by_the_agent_at_work(client: openai.OpenAI, stub: Stub, trace: AttemptTrace) -> None:
    client.chat.completions.create(**REQUEST)
    with lr.operation(**{"agent.name": "Plänér 1"}) as op:
        client.chat.completions.create(**REQUEST)
        client.chat.completions.create(**REQUEST, extra_headers={"X-Lightning-Agent": "mine"})
    headers = [request.headers.get("x-lightning-agent") for request in stub.asked]
    assert headers == [None, "Pl%C3%A4n%C3%A9r 1", "mine"]
    assert [span["attributes"].get("gen_ai.agent.name") for span in trace.spans[:3]] == [None, "Plänér 1", "Plänér 1"]
    assert trace.spans[1]["parent_id"] == trace.spans[3]["span_id"] and op.span().name == "agentlightning.operation"


def test_outside_of_an_attempt_the_client_is_as_it_was(client: openai.OpenAI, stub: Stub) -> None:
    assert client.chat.completions.create(**REQUEST).id == "chatcmpl-1"
    assert "x-lightning-agent" not in stub.asked[0].headers


def test_it_can_be_removed_and_is_put_in_once(client: openai.OpenAI, trace: AttemptTrace) -> None:
    from openai._base_client import SyncAPIClient

    uninstrument_openai()
    plain = SyncAPIClient.request
    instrument_openai()
    instrument_openai()
    client.chat.completions.create(**REQUEST)
    uninstrument_openai()
    assert SyncAPIClient.request is plain
    client.chat.completions.create(**REQUEST)
    assert len(trace.spans) == 1


def test_prompts_may_be_left_out(client: openai.OpenAI, trace: AttemptTrace) -> None:
    uninstrument_openai()
    instrument_openai(prompts=False)
    client.chat.completions.create(**REQUEST)
    assert not any(key.startswith(("gen_ai.prompt", "gen_ai.request.functions")) for key in only(trace))
    assert only(trace)["gen_ai.completion.0.content"] == "Looking."


async def test_calls_at_once_stay_apart(async_client: openai.AsyncOpenAI) -> None:
    async def attempt(index: int) -> AttemptTrace:
        with traced(AttemptTrace(f"ro-{index}", "at")) as trace:
            for turn in range(2):
                content = f"{index}.{turn}"
                await async_client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
            lr.emit_reward(float(index))
        return trace

    for index, trace in enumerate(await asyncio.gather(*map(attempt, range(50)))):
        prompts = [span["attributes"].get("gen_ai.prompt.0.content") for span in trace.spans]
        assert prompts == [f"{index}.0", f"{index}.1", None]


def test_a_traced_call_makes_a_triplet(client: openai.OpenAI, trace: AttemptTrace) -> None:
    client.chat.completions.create(**REQUEST)
    lr.emit_reward(0.5)
    [triplet] = TracerTraceToTriplet().adapt([lr.Span.model_validate(row) for row in trace.spans])
    assert triplet.prompt["token_ids"] == [1, 2] and triplet.response["token_ids"] == [3]
    assert triplet.reward == 0.5 and triplet.metadata["response_id"] == "chatcmpl-1"
