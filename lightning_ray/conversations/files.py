"""Conversations from JSONL files, as OpenAI's fine-tuning takes them: ``messages`` and optionally ``tools`` in a line.

An assistant's message with ``"weight": 0`` is context and not trained on. What else a line has is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Conversation:
    """Chat messages, and the tools that could be called. ``where`` names file and line."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_conversations(file: Path) -> Iterator[Conversation]:
    """The file's conversations, line by line; empty lines are passed over. Raises ConfigError that names the line."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield conversation_of(line, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; give a JSONL file in UTF-8") from error


def conversation_of(line: str, where: str) -> Conversation:
    """One line's conversation. Raises ConfigError for what is none, or has nothing to train on."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON: {error}") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f'{where}: has no "messages"; a line is {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        )
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ConfigError(f'{where}: "tools" is {type(tools).__name__}; give a list of tools, or leave it out')
    messages = [_message(message, f"{where}, message {index}") for index, message in enumerate(messages)]
    if not any(is_trained(message) for message in messages):
        raise ConfigError(f"{where}: no message of the assistant is to be trained on; take the line out")
    return Conversation(where, messages, tools or None)


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether it is the assistant's, and has a weight."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _message(message: Any, where: str) -> dict[str, Any]:
    """As chat templates take it: text as a string, arguments of tool calls as objects."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ConfigError(f"{where}: is {message!r:.80}; give an object with a role out of {', '.join(ROLES)}")
    if message.get("weight", 1) not in (0, 1):
        raise ConfigError(f'{where}: "weight" is {message["weight"]!r}; give 1, or 0 for what is not trained on')
    made = {**message, "content": _text(message.get("content"), where)}
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [_call(call, where) for call in calls]
    return made


def _text(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    raise ConfigError(f"{where}: its content has parts that are no text; only text can be trained on")


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ConfigError(f"{where}: a tool call is {call!r:.80}; give type, id and function with name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ConfigError(f"{where}: the arguments of a tool call are no JSON: {arguments!r:.80}") from None
    return {**call, "function": {**function, "arguments": arguments}}
