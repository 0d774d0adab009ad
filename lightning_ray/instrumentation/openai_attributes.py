"""What a call of an OpenAI API says, as attributes of its span, named as Agent Lightning 0.3's tracers do.

Prompt and completion become messages under ``gen_ai.prompt.{i}`` and ``gen_ai.completion.{i}``. What a server leaves
out is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_ray.instrumentation.messages import add_message, add_tools, add_usage, as_json
from lightning_ray.semconv import RESPONSE_ID

_SETTINGS = {
    "model": "model",
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "n": "candidate_count",
}
"""Field of a request -> what follows ``gen_ai.request.``."""


def request_attributes(api: str, body: Mapping[str, Any], prompts: bool = True) -> dict[str, Any]:
    """Of a request body; without its messages and tools on request."""
    attributes: dict[str, Any] = {"gen_ai.system": "OpenAI", "gen_ai.request.streaming": bool(body.get("stream"))}
    for field, name in _SETTINGS.items():
        if isinstance(value := body.get(field), (str, int, float)):
            attributes[f"gen_ai.request.{name}"] = value
    if prompts:
        for index, message in enumerate(_prompt(api, body)):
            add_message(attributes, f"gen_ai.prompt.{index}", message)
        add_tools(attributes, body.get("tools") or body.get("functions") or ())
    return attributes


def response_attributes(api: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Of an answer."""
    attributes: dict[str, Any] = {}
    for field, key in (
        ("id", RESPONSE_ID),
        ("model", "gen_ai.response.model"),
        ("system_fingerprint", "gen_ai.openai.system_fingerprint"),
    ):
        if isinstance(value := answer.get(field), str):
            attributes[key] = value
    messages = _output(answer) if api == "responses" else _choices(answer)
    for index, message in enumerate(messages):
        prefix = f"gen_ai.completion.{index}"
        add_message(attributes, prefix, message)
        if finish := message.get("finish_reason"):
            attributes.setdefault("gen_ai.response.finish_reason", finish)
    add_usage(attributes, answer.get("usage") or {})
    _add_tokens(attributes, answer)
    return attributes


def _prompt(api: str, body: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if api == "chat":
        return [message for message in body.get("messages") or () if isinstance(message, Mapping)]
    if api == "completions":
        prompt = body.get("prompt")
        texts = prompt if isinstance(prompt, list) and all(isinstance(one, str) for one in prompt) else [prompt]
        return [{"role": "user", "content": text} for text in texts]
    messages: list[Mapping[str, Any]] = []
    if instructions := body.get("instructions"):
        messages.append({"role": "system", "content": instructions})
    given = body.get("input")
    return messages + [_item(item) for item in (given if isinstance(given, list) else [given])]


def _item(item: Any) -> Mapping[str, Any]:
    """An item of the Responses API as a chat message."""
    if not isinstance(item, Mapping):
        return {"role": "user", "content": item}
    if item.get("type") == "function_call":
        return {"role": "assistant", "tool_calls": [_call(item, item.get("call_id"))]}
    if item.get("type") == "function_call_output":
        return {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
    if "role" in item:
        return item
    return {"role": item.get("type"), "content": item}


def _call(function: Mapping[str, Any], call_id: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": function}


def _choices(answer: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    for choice in answer.get("choices") or ():
        message = choice.get("message") or {"role": "assistant", "content": choice.get("text")}
        yield {**message, "finish_reason": choice.get("finish_reason")}


def _output(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for item in answer.get("output") or ():
        if item.get("type") == "message":
            texts += [part.get("text") or "" for part in item.get("content") or ()]
        elif item.get("type") == "function_call":
            calls.append(_call(item, item.get("call_id")))
    message = {"role": "assistant", "content": "".join(texts), "finish_reason": answer.get("status")}
    return [{**message, "tool_calls": calls} if calls else message]


def _add_tokens(attributes: dict[str, Any], answer: Mapping[str, Any]) -> None:
    """Token ids and logprobs, where the server was asked for them (vLLM's ``return_token_ids``)."""
    if isinstance(ids := answer.get("prompt_token_ids"), list):
        attributes["prompt_token_ids"] = ids
    first: Mapping[str, Any] = next(iter(answer.get("choices") or ()), {})
    ids = first.get("token_ids") or (first.get("provider_specific_fields") or {}).get("token_ids")
    older = answer.get("response_token_ids")
    if ids is None and isinstance(older, list) and older:
        ids = older[0]
    if isinstance(ids, list):
        attributes["response_token_ids"] = ids
    logprobs = first.get("logprobs")
    if isinstance(logprobs, Mapping):
        for field in ("content", "refusal"):
            if logprobs.get(field):
                attributes[f"logprobs.{field}"] = as_json(logprobs[field])
