"""Spans into chat messages, in the form that OpenAI's fine-tuning and others take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypedDict

from lightning_ray.adapters.base import TraceAdapter, our_spans
from lightning_ray.otel import filter_and_unflatten_attributes
from lightning_ray.semconv import RESPONSE_ID
from lightning_ray.span import Span


class OpenAIMessages(TypedDict):
    """A conversation up to one answer, and the tools that could be called."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


class TraceToMessages(TraceAdapter[list[OpenAIMessages]]):
    """One conversation for each model call, in the order of the spans; a call seen twice is one.

    Tool calls are those of the answer itself; without them, those that spans directly under the call's say were run.
    """

    def adapt(self, source: Sequence[Any], /) -> list[OpenAIMessages]:
        """The conversations of one rollout's spans; spans that are no model calls are passed over."""
        spans = our_spans(source)
        found = []
        for span in _joined(spans):
            prompt, completion = _list(span, "gen_ai.prompt"), _list(span, "gen_ai.completion")
            if prompt or completion:
                found.append(_conversation(span, prompt, completion, self.get_tool_calls(span, spans)))
        return found

    def get_tool_calls(self, completion: Span, all_spans: Sequence[Span], /) -> list[dict[str, Any]]:
        """What spans directly under a call's say of tools: ``name``, ``parameters`` and ``call`` of each."""
        children = [span for span in all_spans if span.parent_id == completion.span_id]
        tools = [_nested(child, "tool") for child in children]
        return [tool for tool in tools if isinstance(tool, dict) and tool]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The spans, those of one response id joined in the first."""
    joined: dict[str, Span] = {}
    for span in spans:
        key = span.attributes.get(RESPONSE_ID) or span.span_id
        if (first := joined.get(key)) is not None:
            span = first.model_copy(update={"attributes": {**span.attributes, **first.attributes}})
        joined[key] = span
    return list(joined.values())


def _nested(span: Span, prefix: str) -> Any:
    return filter_and_unflatten_attributes({k: v for k, v in span.attributes.items() if k != prefix}, prefix)


def _list(span: Span, prefix: str) -> list[dict[str, Any]]:
    """The messages under a prefix, by their number; whatever else is under it is no message."""
    nested = _nested(span, prefix)
    if isinstance(nested, dict):
        nested = [nested[key] for key in sorted((key for key in nested if key.isdigit()), key=int)]
    return [one for one in nested if isinstance(one, dict)]


def _conversation(
    span: Span, prompt: list[dict[str, Any]], completion: list[dict[str, Any]], run: list[dict[str, Any]]
) -> OpenAIMessages:
    messages = [_message(one) for one in prompt]
    for answer in completion:
        message = _message({"role": "assistant", **answer})
        if "tool_calls" not in message and run:
            message["tool_calls"] = [_run_call(tool) for tool in run]
        messages.append(message)
    functions = _list(span, "gen_ai.request.functions")
    return OpenAIMessages(messages=messages, tools=[_tool(one) for one in functions] or None)


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """A chat message of attributes: content None where there is none, images as they were sent."""
    message: dict[str, Any] = {"role": given.get("role", "user"), "content": _content(given.get("content"))}
    for field in ("name", "tool_call_id"):
        if field in given:
            message[field] = given[field]
    if calls := given.get("tool_calls"):
        message["tool_calls"] = [_call(one) for one in calls]
    elif message["content"] is None:
        message["content"] = ""
    return message


def _content(content: Any) -> Any:
    if isinstance(content, str) and content.startswith("[{"):
        try:
            parts = json.loads(content)
        except ValueError:
            return content
        if all(isinstance(part, dict) and "type" in part for part in parts):
            return parts
    return content


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call.get("name"), "arguments": call.get("arguments", "")}
    return {"id": call.get("id"), "type": call.get("type", "function"), "function": function}


def _run_call(tool: dict[str, Any]) -> dict[str, Any]:
    call = tool.get("call") or {}
    return _call({**call, "name": tool.get("name"), "arguments": tool.get("parameters", "")})


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {}
    if isinstance(parameters, str):
        parameters = json.loads(parameters)
    return {
        "type": "function",
        "function": {
            "name": function.get("name"),
            "description": function.get("description", ""),
            "parameters": parameters,
        },
    }
