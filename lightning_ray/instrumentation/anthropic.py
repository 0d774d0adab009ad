"""The Anthropic client: its messages are traced, said in the words of OpenAI's chat as all model calls are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_ray.instrumentation.client_calls import Client
from lightning_ray.instrumentation.messages import add_message, add_tools, add_usage, as_json
from lightning_ray.semconv import RESPONSE_ID

_SETTINGS = ("model", "temperature", "top_p", "top_k", "max_tokens")


def request_attributes(api: str, body: Mapping[str, Any], prompts: bool = True) -> dict[str, Any]:
    """Of a request body; without its messages and tools on request."""
    attributes: dict[str, Any] = {"gen_ai.system": "Anthropic", "gen_ai.request.streaming": bool(body.get("stream"))}
    for name in _SETTINGS:
        if isinstance(value := body.get(name), (str, int, float)):
            attributes[f"gen_ai.request.{name}"] = value
    if prompts:
        messages = list(body.get("messages") or ())
        if system := body.get("system"):
            messages.insert(0, {"role": "system", "content": system})
        for index, message in enumerate(messages):
            add_message(attributes, f"gen_ai.prompt.{index}", _said(message))
        add_tools(attributes, body.get("tools") or ())
    return attributes


def response_attributes(api: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Of an answer."""
    attributes: dict[str, Any] = {}
    for field, key in (("id", RESPONSE_ID), ("model", "gen_ai.response.model")):
        if isinstance(value := answer.get(field), str):
            attributes[key] = value
    if isinstance(finish := answer.get("stop_reason"), str):
        attributes["gen_ai.response.finish_reason"] = finish
    said = {**_said({"role": "assistant", "content": answer.get("content")}), "finish_reason": finish}
    add_message(attributes, "gen_ai.completion.0", said)
    add_usage(attributes, answer.get("usage") or {})
    return attributes


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its blocks: text as its content, tool uses as calls, anything else as JSON."""
    blocks = message.get("content")
    if not isinstance(blocks, list):
        return {"role": message.get("role"), "content": blocks}
    calls = [_call(block) for block in blocks if block.get("type") == "tool_use"]
    rest = [block for block in blocks if block.get("type") != "tool_use"]
    plain = all(block.get("type") == "text" for block in rest)
    content = "".join(block.get("text") or "" for block in rest) if plain else as_json(rest)
    return {"role": message.get("role"), "content": content, "tool_calls": calls}


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": block.get("id"), "function": {"name": block.get("name"), "arguments": as_json(block.get("input"))}}


class AnthropicStream:
    """Events of a streamed message."""

    def __init__(self, api: str):
        self.answer: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._inputs: dict[int, str] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """The next event."""
        kind, index = chunk.get("type"), chunk.get("index") or 0
        if kind == "message_start":
            self.answer = dict(chunk["message"])
        elif kind == "content_block_start":
            self._blocks[index] = dict(chunk["content_block"])
        elif kind == "content_block_delta":
            self._grow(index, chunk["delta"])
        elif kind == "message_delta":
            self.answer.update(chunk.get("delta") or {})
            self.answer["usage"] = {**(self.answer.get("usage") or {}), **(chunk.get("usage") or {})}
        self.answer["content"] = [self._blocks[one] for one in sorted(self._blocks)]

    def _grow(self, index: int, delta: Mapping[str, Any]) -> None:
        block = self._blocks[index]
        for field in ("text", "thinking"):
            if isinstance(piece := delta.get(field), str):
                block[field] = block.get(field, "") + piece
        if isinstance(piece := delta.get("partial_json"), str):
            self._inputs[index] = self._inputs.get(index, "") + piece
            try:
                block["input"] = json.loads(self._inputs[index])
            except ValueError:
                block["input"] = self._inputs[index]  # until the rest has come


ANTHROPIC = Client(
    package="anthropic",
    apis={"/v1/messages": "messages"},
    request_attributes=request_attributes,
    response_attributes=response_attributes,
    streamed_answer=AnthropicStream,
)


def instrument_anthropic(prompts: bool = True) -> None:
    """Trace the Anthropic client of this process; once is enough. ``prompts=False`` leaves requests' messages out."""
    ANTHROPIC.instrument(prompts)


def uninstrument_anthropic() -> None:
    """Undo ``instrument_anthropic``."""
    ANTHROPIC.uninstrument()
