"""Streams compare by what they tell, not by where vLLM cut them."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.wire.streams import events


def stream(*deltas: dict[str, Any], **last: Any) -> str:
    """A chat's stream with these pieces."""
    ends = [{}] * (len(deltas) - 1) + [last]
    chunks = [
        {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, **end}]}
        for delta, end in zip(deltas, ends, strict=True)
    ]
    return "".join(f"data: {text}\n\n" for text in [*map(json.dumps, chunks), "[DONE]"])


def call(number: int = 0, name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    """A piece of a tool's call."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"index": number, "function": function, **({} if name is None else {"id": f"call-{id(function)}"})}


ONE_BY_ONE = (
    {"role": "assistant", "content": ""},
    {"reasoning": "pa"},
    {"reasoning": "ris"},
    {"content": None, "tool_calls": [call(name="get_weather")]},
    {"tool_calls": [call(arguments='{"city": "')]},
    {"tool_calls": [call(arguments='paris"}')]},
)


def test_a_chat_is_the_same_wherever_its_pieces_were_joined() -> None:
    one_by_one = events(stream(*ONE_BY_ONE, finish_reason="tool_calls"))
    twice = [call(name="get_weather"), call(arguments='{"city": "')]
    for deltas in (
        [*ONE_BY_ONE[:3], {"content": None, "tool_calls": twice}, ONE_BY_ONE[5]],
        [*ONE_BY_ONE[:3], {"content": None, "tool_calls": [call(name="get_weather", arguments='{"city": "paris"}')]}],
        [
            {"role": "assistant", "content": ""},
            {"reasoning": "paris", "content": None, "tool_calls": twice},
            ONE_BY_ONE[5],
        ],
    ):
        assert events(stream(*deltas, finish_reason="tool_calls")) == one_by_one


def test_a_chat_that_tells_something_else_is_another() -> None:
    one_by_one = events(stream(*ONE_BY_ONE, finish_reason="tool_calls"))
    for deltas in (
        ONE_BY_ONE[:-1],
        [*ONE_BY_ONE[:2], *ONE_BY_ONE[3:]],
        [*ONE_BY_ONE, {"reasoning": " "}],
        [*ONE_BY_ONE[:5], {"tool_calls": [call(1, arguments='paris"}')]}],
        [ONE_BY_ONE[0], *ONE_BY_ONE[3:], *ONE_BY_ONE[1:3]],
    ):
        assert events(stream(*deltas, finish_reason="tool_calls")) != one_by_one
    assert events(stream(*ONE_BY_ONE, finish_reason="stop")) != one_by_one
