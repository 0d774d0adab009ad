"""The SDKs that agents call with, each as its users write it. A call asks one thing and tells what it heard."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import anthropic
import openai

from tests.e2e.wire.served import MODEL, Session

T = TypeVar("T")
QUESTION = "What is the weather in paris?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
PROMPT = "<|im_start|>user\nparis<|im_end|>\n<|im_start|>assistant\n"
"""The same, as the chat template says it."""
MOST = 40


@dataclass
class Heard:
    """What a client made of an answer."""

    text: str
    reasoning: str
    used: int
    """Tokens, as the answer counts them."""
    raw: Any
    """The answer, or its events."""
    api: str
    name: str = "openai.chat.completion"
    """Of the span that it should have become."""
    agent: str = "by-path"


async def chat(session: Session) -> Heard:
    def call() -> Any:
        client = openai.OpenAI(base_url=session.base, api_key=session.key)
        return client.chat.completions.create(model=MODEL, messages=MESSAGES)

    answer = await asyncio.to_thread(call)
    return heard_chat(answer)


async def chat_async(session: Session) -> Heard:
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    return heard_chat(await client.chat.completions.create(model=MODEL, messages=MESSAGES))


def heard_chat(answer: Any) -> Heard:
    said = answer.choices[0].message
    return Heard(said.content, said.reasoning, answer.usage.completion_tokens, answer.model_dump(), "chat")


async def chat_stream(session: Session) -> Heard:
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    options: Any = {"include_usage": True}
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, stream_options=options)
    heard = Heard("", "", 0, [], "chat")
    async for chunk in stream:
        for choice in chunk.choices:
            heard.text += choice.delta.content or ""
            heard.reasoning += getattr(choice.delta, "reasoning", None) or ""
        heard.used = chunk.usage.completion_tokens if chunk.usage else heard.used
        heard.raw.append(chunk.model_dump())
    return heard


async def completions(session: Session) -> Heard:
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    answer = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=MOST)
    used = answer.usage.completion_tokens if answer.usage else 0
    return Heard(answer.choices[0].text, "", used, answer.model_dump(), "completions", "openai.completion")


async def completions_stream(session: Session) -> Heard:
    def call() -> list[Any]:
        client = openai.OpenAI(base_url=session.base, api_key=session.key)
        options: Any = {"include_usage": True}
        return list(
            client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=MOST, stream=True, stream_options=options)
        )

    chunks = await asyncio.to_thread(call)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    raw = [chunk.model_dump() for chunk in chunks]
    return Heard(text, "", chunks[-1].usage.completion_tokens, raw, "completions", "openai.completion")


async def responses(session: Session) -> Heard:
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    return heard_response(await client.responses.create(model=MODEL, input=QUESTION), [])


async def responses_stream(session: Session) -> Heard:
    client = openai.AsyncOpenAI(base_url=session.base, api_key=session.key)
    events = [event async for event in await client.responses.create(model=MODEL, input=QUESTION, stream=True)]
    heard = heard_response(events[-1].response, events)
    assert heard.text == "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return heard


def heard_response(answer: Any, events: list[Any]) -> Heard:
    thought = "".join(part.text for item in answer.output if item.type == "reasoning" for part in item.content)
    raw = [event.model_dump() for event in events] or answer.model_dump()
    return Heard(answer.output_text, thought, answer.usage.output_tokens, raw, "responses", "openai.response")


async def messages(session: Session) -> Heard:
    def call() -> Any:
        client = anthropic.Anthropic(base_url=session.address, api_key=session.key)
        return client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=MOST)

    return heard_message(await asyncio.to_thread(call), None)


async def messages_stream(session: Session) -> Heard:
    client = anthropic.AsyncAnthropic(base_url=session.address, api_key=session.key)
    async with client.messages.stream(model=MODEL, messages=MESSAGES, max_tokens=MOST) as stream:
        events = [event.model_dump() async for event in stream]
        return heard_message(await stream.get_final_message(), events)


def heard_message(answer: Any, events: list[Any] | None) -> Heard:
    parts = {block.type: block for block in answer.content}
    text, thought = parts["text"].text, parts["thinking"].thinking
    raw = answer.model_dump() if events is None else events
    return Heard(text, thought, answer.usage.output_tokens, raw, "messages", "anthropic.message")


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once."""
    return await asyncio.gather(*calls)
