"""Chat messages, tools and token counts as attributes, written as Agent Lightning 0.3's tracers write them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def add_message(attributes: dict[str, Any], prefix: str, message: Mapping[str, Any]) -> None:
    """A message in the form of OpenAI's chat completions."""
    for field in ("role", "content", "name", "tool_call_id", "refusal", "reasoning_content", "finish_reason"):
        add(attributes, f"{prefix}.{field}", message.get(field))
    for index, call in enumerate(message.get("tool_calls") or ()):
        function, place = call.get("function") or {}, f"{prefix}.tool_calls.{index}"
        add(attributes, f"{place}.id", call.get("id"))
        add(attributes, f"{place}.type", call.get("type") or "function")
        add(attributes, f"{place}.name", function.get("name"))
        add(attributes, f"{place}.arguments", function.get("arguments"))


def add_tools(attributes: dict[str, Any], tools: Iterable[Any]) -> None:
    """What may be called: OpenAI's tools and functions, Anthropic's tools."""
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        place = f"gen_ai.request.functions.{index}"
        add(attributes, f"{place}.name", function.get("name"))
        add(attributes, f"{place}.description", function.get("description"))
        add(attributes, f"{place}.parameters", function.get("parameters", function.get("input_schema")))


def add_usage(attributes: dict[str, Any], usage: Mapping[str, Any]) -> None:
    """Tokens counted by the server."""
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    total = usage.get("total_tokens")
    if total is None and isinstance(prompt, int) and isinstance(completion, int):
        total = prompt + completion
    for name, value in (("prompt_tokens", prompt), ("completion_tokens", completion), ("total_tokens", total)):
        if isinstance(value, int):
            attributes[f"gen_ai.usage.{name}"] = value


def add(attributes: dict[str, Any], key: str, value: Any) -> None:
    """A value as text; None is left out."""
    if value is not None:
        attributes[key] = value if isinstance(value, str) else as_json(value)


def as_json(value: Any) -> str:
    """JSON, or the text of what JSON cannot express."""
    return json.dumps(value, ensure_ascii=False, default=str)
