"""Several turns with tools and reasoning: each prompt extends what was sampled, whatever the parsers made of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from lightning_ray.serving import CPU_ENGINE, QUIET
from lightning_ray.trajectories.episode import read_episodes
from tests.e2e.wire.cases import CHAT_TOOLS, FLAT_TOOLS, MESSAGE_TOOLS
from tests.e2e.wire.clients import MOST
from tests.e2e.wire.served import MODEL, Served, Session
from tests.tool_model import END, hermes_call

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]
ROOT = Path(__file__).resolve().parents[3]
TOLD = {"paris": "sunny", "oslo": "rainy"}
CALLS = [
    f"<think>{city}</think>{said}{END}"
    for city, weather in TOLD.items()
    for said in (hermes_call("get_weather", {"city": city}), f"It is {weather} in {city}.")
]
"""What a policy samples that is asked for the weather of both."""


async def chat(session: Session) -> None:
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    messages: list[Any] = []
    for city, weather in TOLD.items():
        messages.append({"role": "user", "content": f"And in {city}?"})
        answer = await client.chat.completions.create(model=MODEL, messages=messages, **CHAT_TOOLS)  # type: ignore[call-overload]
        said = answer.choices[0].message
        [call] = said.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and json.loads(call.function.arguments) == {"city": city}
        messages += [said, {"role": "tool", "tool_call_id": call.id, "content": weather}]
        answer = await client.chat.completions.create(model=MODEL, messages=messages, **CHAT_TOOLS)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == f"It is {weather} in {city}."
        messages.append(answer.choices[0].message)


async def responses(session: Session) -> None:
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    items: list[Any] = []
    for city, weather in TOLD.items():
        items.append({"role": "user", "content": f"And in {city}?"})
        answer = await client.responses.create(model=MODEL, input=items, **FLAT_TOOLS)  # type: ignore[call-overload]
        [call] = [item for item in answer.output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"city": city}
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": weather})
        answer = await client.responses.create(model=MODEL, input=items, **FLAT_TOOLS)  # type: ignore[call-overload]
        assert answer.output_text == f"It is {weather} in {city}."
        items += [item.model_dump(exclude_none=True) for item in answer.output]


async def messages(session: Session) -> None:
    client = anthropic.AsyncAnthropic(base_url=session.address, api_key=session.key)
    said: list[Any] = []
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": MOST, **MESSAGE_TOOLS}
    for city, weather in TOLD.items():
        said.append({"role": "user", "content": f"And in {city}?"})
        answer = await client.messages.create(messages=said, **asked)
        [call] = [block for block in answer.content if block.type == "tool_use"]
        assert answer.stop_reason == "tool_use" and call.input == {"city": city}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": weather}
        said += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        answer = await client.messages.create(messages=said, **asked)
        assert answer.content[-1].text == f"It is {weather} in {city}."
        said.append({"role": "assistant", "content": answer.content})


@pytest.mark.parametrize("play", [chat, responses, messages], ids=lambda play: play.__name__)
async def test_a_conversation_with_tools_and_reasoning_is_one_trajectory(
    served: Served, play: Callable[[Session], Awaitable[None]]
) -> None:
    session = await served.attempt(temperature=0.0)
    await play(session)
    calls = await session.calls()
    assert [served.text(call["sampled_ids"]) for call in calls] == CALLS
    for before, after in pairwise(calls):
        said = before["prompt_ids"] + before["sampled_ids"]
        assert after["prompt_ids"][: len(said)] == said
    assert not any("restored_tokens" in call["attributes"] for call in calls), "the template itself says it so"
    [trajectory] = await trajectories(session)
    assert trajectory.calls == 4
    assert trajectory.token_ids[trajectory.mask == 1].tolist() == [i for call in calls for i in call["sampled_ids"]]


async def trajectories(session: Session) -> list[Any]:
    """As a training step reads them."""
    store = session.served.store
    rollout = await store.get_rollout_by_id(session.rollout_id)
    assert rollout is not None
    spans = await store.scan_spans([session.rollout_id])
    [episode] = read_episodes([rollout], spans, {session.rollout_id: session.attempt_id})
    return episode.trajectories


async def test_what_no_parser_can_read_is_kept_as_it_was_sampled(served: Served) -> None:
    session = await served.attempt()
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "paris"}], **CHAT_TOOLS}
    asked |= {"temperature": 2.0, "presence_penalty": 2.0, "max_tokens": MOST, "extra_body": {"return_token_ids": True}}
    answers = [await client.chat.completions.create(**asked, seed=seed) for seed in range(8)]
    calls = await session.calls()
    assert [call["sampled_ids"] for call in calls] == [answer.choices[0].token_ids for answer in answers]
    assert len({tuple(call["sampled_ids"]) for call in calls}) > 4


async def test_random_words_drift_without_continuation_and_never_with_it(tmp_path: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "tests.e2e.wire.continuation", str(tmp_path)]
    environment = os.environ | QUIET | CPU_ENGINE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe)
    output, complaint = await process.communicate()
    assert process.returncode == 0, complaint.decode()[-3000:]
    found = json.loads(output.splitlines()[-1])
    assert found["with"]["whole"] > 4 and found["without"]["whole"] > 4
    assert found["without"]["drifted"] > found["without"]["whole"] / 2
    assert found["with"].get("drifted", 0) == 0 and found["with"]["restored"] > 10
