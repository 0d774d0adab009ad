"""Answers as they compare: without what is their own, and streams with their pieces put together.

vLLM itself joins tokens that its app had no time to take one by one, so that where a stream is cut depends on how busy
the machine is: a chat's piece may end the reasoning and begin, or even finish, a tool's call.
"""

from __future__ import annotations

import json
from typing import Any

OWN = ("id", "item_id", "call_id", "created", "created_at", "completed_at", "signature")
"""What differs from one answer of a server to the next."""
TEXTS = ("content", "reasoning", "text", "delta", "arguments", "thinking", "partial_json")
LISTS = ("content", "tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "logprobs")
"""What streams tell piece by piece."""
KINDS = ("reasoning", "content", "tool_calls")
"""What a chat's piece tells of, in the order in which it is said."""
MARKS = ("<think>", "</think>")
"""Tokens that say nothing: a chat's stream has their chances only where one was joined with others."""


class OtherKindError(Exception):
    """Two pieces are not of one kind."""


def plain(value: Any) -> Any:
    """Without what is an answer's own."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {
            key: "its own" if key in OWN else plain(item) for key, item in value.items() if key != "sequence_number"
        }
    return value


def events(text: str) -> list[Any]:
    """A stream's events, their kind and data; those of several choices one choice after the other."""
    found = []
    for event in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else _told(plain(json.loads(data)))))
    return joined(sorted(found, key=_choice))


def joined(pieces: list[Any]) -> list[Any]:
    """Pieces of one kind that follow each other as one."""
    whole: list[Any] = []
    for kind, data in pieces:
        try:
            if not whole or whole[-1][0] != kind:
                raise OtherKindError
            whole[-1] = (kind, _join(whole[-1][1], data))
        except OtherKindError:
            whole.append((kind, data))
    return whole


def _told(data: Any) -> Any:
    """A chat's piece with the order of what it tells of, its tools' calls by their number and no marks' chances."""
    choices = data["choices"] if data.get("object") == "chat.completion.chunk" else []
    for choice in choices:
        delta = choice["delta"]
        delta["order"] = [kind for kind in KINDS if delta.get(kind)]
        calls: dict[int, Any] = {}
        for call in delta.get("tool_calls") or ():
            calls[call["index"]] = _join(calls.get(call["index"]), call)
        delta["tool_calls"] = calls
        if chances := choice.get("logprobs"):
            chances["content"] = [token for token in chances["content"] or () if token["token"] not in MARKS]
    return data


def _join(a: Any, b: Any, key: str = "") -> Any:
    if key == "finish_reason" and a is not None:
        raise OtherKindError  # nothing joins what has ended
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict) and isinstance(b, dict):
        return {name: _join(a.get(name), b.get(name), name) for name in {**a, **b}}
    if isinstance(a, list) and isinstance(b, list):
        if key == "order":
            return a + b[1:] if a[-1:] == b[:1] else a + b
        if key in LISTS:
            return a + b
        if len(a) == len(b):
            return [_join(x, y) for x, y in zip(a, b, strict=True)]
    if isinstance(a, str) and isinstance(b, str) and key in TEXTS:
        return a + b
    if a != b:
        raise OtherKindError
    return a


def _choice(event: tuple[str | None, Any]) -> int:
    """Which choice an event belongs to; those of none come last."""
    choices = event[1].get("choices") if isinstance(event[1], dict) else None
    return 0 if choices is None and event[1] != "[DONE]" else choices[0]["index"] if choices else 1000
