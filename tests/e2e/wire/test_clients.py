"""Every client is answered, and each sequence that was sampled for it is in the store, token by token."""

from __future__ import annotations

import shutil
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import openai
import pytest

from tests.e2e.wire import clients
from tests.e2e.wire.clients import MESSAGES, MOST, PROMPT, Heard
from tests.e2e.wire.programs import curl, node
from tests.e2e.wire.served import MODEL, Served, Session
from tests.tool_model import END

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]
SDKS = [
    clients.chat,
    clients.chat_async,
    clients.chat_stream,
    clients.completions,
    clients.completions_stream,
    clients.responses,
    clients.responses_stream,
    clients.messages,
    clients.messages_stream,
]
PROGRAMS = {"curl": [curl], "node": [node("chat"), node("chat-stream"), node("responses-stream")]}
CLIENTS = [
    *(pytest.param(call, id=call.__name__) for call in SDKS),
    *(
        pytest.param(call, id=call.__name__, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name}"))
        for name, calls in PROGRAMS.items()
        for call in calls
    ),
]


@pytest.mark.parametrize("call", CLIENTS)
async def test_a_clients_call_is_answered_and_stored_token_by_token(
    served: Served, call: Callable[[Session], Awaitable[Heard]]
) -> None:
    session = await served.attempt(agent="by-path", temperature=0.0)
    before = time.time()
    heard = await call(session)
    after = time.time()
    if heard.api == "completions":
        assert heard.text == "<think>paris</think>Look up paris."
    else:
        assert (heard.text, heard.reasoning) == ("Look up paris.", "paris")
    assert not told(heard.raw), "nothing but what the client asked for"
    [span] = await session.calls()
    check_tokens(served, span)
    assert served.text(span["sampled_ids"]) == f"<think>paris</think>Look up paris.{END}"
    assert served.text(span["prompt_ids"]) == PROMPT
    assert (span["name"], span["agent"], span["model"]) == (heard.name, heard.agent, MODEL)
    assert (span["status"], span["finish_reason"]) == ("OK", "stop")
    assert before <= span["start_time"] <= span["end_time"] <= after
    check_figures(span, heard.used)


def check_tokens(served: Served, span: dict[str, Any]) -> None:
    """One logprob, that of the model, and one version for each id."""
    ids, logprobs = span["sampled_ids"], span["logprobs"]
    assert len(ids) == len(logprobs) == len(span["weight_versions"]) > 0
    assert set(span["weight_versions"]) == {0}
    found = served.logprobs(span["prompt_ids"], ids)
    assert np.abs(np.asarray(found) - np.asarray(logprobs)).max() < 1e-4


def check_figures(span: dict[str, Any], used: int) -> None:
    """Usage, times and sampling parameters."""
    told = span["attributes"]
    assert told["usage"] | {"cached_tokens": 0} == {
        "prompt_tokens": len(span["prompt_ids"]),
        "completion_tokens": used,
        "cached_tokens": 0,
    }
    assert used == len(span["sampled_ids"])
    timing = told["timing"]
    assert 0 <= timing["queue"] < timing["first_token"] <= timing["total"]
    assert timing["total"] == pytest.approx(span["end_time"] - span["start_time"])
    assert told["sampling"]["temperature"] == 0.0, "as the key fixes it"
    assert told["request"]["model"] == MODEL


def told(value: Any) -> list[Any]:
    """Whatever an answer says of tokens."""
    if isinstance(value, list):
        return [found for item in value for found in told(item)]
    if isinstance(value, dict):
        inner = [found for item in value.values() for found in told(item)]
        names = ("logprobs", "top_logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids")
        return [value[name] for name in names if value.get(name)] + inner
    return []


async def test_each_of_several_choices_is_a_span_with_the_ids_that_the_engine_itself_tells(served: Served) -> None:
    session = await served.attempt()
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    ids: Any = {"return_token_ids": True}
    chat = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=3, temperature=2.0, max_tokens=MOST, extra_body=ids
    )
    text = await client.completions.create(
        model=MODEL, prompt=[PROMPT, PROMPT], n=2, temperature=2.0, max_tokens=MOST, extra_body=ids
    )
    spans = await session.calls()
    assert len(spans) == 3 + 4
    assert sorted(s["sampled_ids"] for s in spans[:3]) == sorted(c.token_ids for c in chat.choices)
    assert sorted(s["sampled_ids"] for s in spans[3:]) == sorted(c.token_ids for c in text.choices)
    assert len({span["trace_id"] for span in spans[:3]}) == len({span["trace_id"] for span in spans[3:]}) == 1
    assert len({span["span_id"] for span in spans}) == 7
    for span in spans:
        check_tokens(served, span)


async def test_the_sampling_parameters_are_those_that_the_engine_got(served: Served) -> None:
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3, "max_tokens": 7, "stop": ["up"]}
    body = {"model": MODEL, "messages": MESSAGES, **asked}
    free = await served.attempt()
    fixed = await served.attempt(temperature=1.0, top_p=1.0, top_k=0)
    for session in (free, fixed):
        assert (await session.post("/v1/chat/completions", body)).status_code == 200
    [as_asked], [as_fixed] = await free.calls(), await fixed.calls()
    assert as_asked["attributes"]["sampling"].items() >= asked.items()
    forced = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert as_fixed["attributes"]["sampling"].items() >= (asked | forced).items()
    assert as_asked["attributes"]["request"] == as_fixed["attributes"]["request"] == body


@pytest.mark.parametrize("path", ["/v1", "/agent/reporter/v1"])
async def test_the_key_alone_tells_whose_call_it_is(served: Served, path: str) -> None:
    session = await served.attempt()
    client = openai.AsyncOpenAI(base_url=served.root + path, api_key=session.key)
    await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    [span] = await session.calls()
    assert span["agent"] == ("reporter" if "reporter" in path else None)
    check_tokens(served, span)


async def test_forty_agents_at_once_are_kept_apart(served: Served) -> None:
    sessions = [await served.attempt(agent=f"agent-{index}") for index in range(40)]
    ids: Any = {"return_token_ids": True, "min_tokens": 30}

    async def play(session: Session) -> list[list[int]]:
        client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
        said = []
        for _ in range(2):
            answer = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, temperature=2.0, max_tokens=MOST, extra_body=ids
            )
            said.append(answer.choices[0].token_ids)  # type: ignore[attr-defined]
        return said

    heard = await clients.together(play(session) for session in sessions)
    for session, said in zip(sessions, heard, strict=True):
        spans = await session.calls()
        assert [span["sampled_ids"] for span in spans] == said
        assert {span["agent"] for span in spans} == {session.agent}
