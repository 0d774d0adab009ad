"""Requests of all four wire APIs whose answers have to be those of vLLM's own server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.e2e.wire.clients import MESSAGES, MOST, PROMPT, QUESTION
from tests.e2e.wire.served import MODEL

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["paris", "oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": CITY}
CHAT_TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
FLAT_TOOLS = {"tools": [{"type": "function", **FUNCTION}]}
MESSAGE_TOOLS = {"tools": [{"name": "get_weather", "description": "The weather.", "input_schema": CITY}]}
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 2.0, "seed": 11}
"""Hot enough for a model that is sure of itself to say something else."""
LONG = "a " * 600


@dataclass(frozen=True)
class Case:
    """One request."""

    name: str
    path: str
    body: dict[str, Any]


def chat(name: str, **body: Any) -> Case:
    return Case(f"chat-{name}", "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": MOST, **body})


def completion(name: str, **body: Any) -> Case:
    return Case(f"completions-{name}", "/v1/completions", {"prompt": PROMPT, "max_tokens": MOST, **body})


def response(name: str, **body: Any) -> Case:
    return Case(f"responses-{name}", "/v1/responses", {"input": QUESTION, "max_output_tokens": MOST, **body})


def message(name: str, **body: Any) -> Case:
    return Case(f"messages-{name}", "/v1/messages", {"messages": MESSAGES, "max_tokens": MOST, **body})


def schema(name: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": CITY, "strict": True}}


ANSWERED = [
    chat("greedy", **GREEDY),
    chat("seeded", **SEEDED),
    chat("usage", **GREEDY, stream_options={"include_usage": True}),
    chat("tools-auto", **GREEDY, **CHAT_TOOLS, tool_choice="auto"),
    chat("tools-auto-seeded", **SEEDED, **CHAT_TOOLS, tool_choice="auto"),
    chat("tools-required", **GREEDY, **CHAT_TOOLS, tool_choice="required"),
    chat("tool-named", **GREEDY, **CHAT_TOOLS, tool_choice={"type": "function", "function": {"name": "get_weather"}}),
    chat("schema", **GREEDY, response_format=schema("city")),
    chat("logprobs", **SEEDED, logprobs=True, top_logprobs=3),
    chat("choices", **SEEDED, n=2),
    chat("stop", **GREEDY, stop=["up"]),
    chat("cut", **GREEDY, **{"max_tokens": 3}),
    chat("ids", **SEEDED, return_token_ids=True),
    completion("greedy", **GREEDY),
    completion("seeded", **SEEDED),
    completion("logprobs", **SEEDED, logprobs=2),
    completion("echo", **GREEDY, echo=True),
    completion("echo-logprobs", **GREEDY, echo=True, logprobs=1),
    completion("choices", **SEEDED, n=2, prompt=[PROMPT, PROMPT]),
    completion("ids", **GREEDY, prompt=[2, 8, 132, 20, 1, 132, 2, 9, 132]),
    completion("stop", **GREEDY, stop=["up", "It"], include_stop_str_in_output=True),
    response("greedy", **GREEDY),
    response("seeded", **SEEDED),
    response("tools-auto", **GREEDY, **FLAT_TOOLS),
    response("tools-required", **GREEDY, **FLAT_TOOLS, tool_choice="required"),
    response("schema", **GREEDY, text={"format": {"type": "json_schema", "name": "city", "schema": CITY}}),
    response("cut", **GREEDY, **{"max_output_tokens": 3}),
    message("greedy", **GREEDY),
    message("tools-auto", **GREEDY, **MESSAGE_TOOLS),
    message("tools-any", **GREEDY, **MESSAGE_TOOLS, tool_choice={"type": "any"}),
    message("system", **GREEDY, system="Be brief."),
    message("stop", **GREEDY, stop_sequences=["up"]),
]

REFUSED = [
    *(make("model", model="another") for make in (chat, completion, response, message)),
    *(make("temperature", temperature=-1.0) for make in (chat, completion, response, message)),
    chat("long", messages=[{"role": "user", "content": "paris"}] * 200),
    completion("long", prompt=LONG),
    response("long", input=[{"role": "user", "content": "paris"}] * 200),
    message("long", messages=[{"role": "user", "content": "paris"}] * 200),
    chat("most", max_tokens=100_000),
    chat("none", messages=None),
    chat("text", messages="hello"),
    chat("template", chat_template="{{ 1 }}"),
    completion("none", prompt=None),
    message("none", messages=None),
    chat("tool", tool_choice="required"),
]

PASSED = [
    Case("tokenize", "/tokenize", {"prompt": PROMPT}),
    Case("tokenize-chat", "/tokenize", {"messages": MESSAGES}),
    Case("detokenize", "/detokenize", {"tokens": [2, 8, 132]}),
    Case("count-tokens", "/v1/messages/count_tokens", {"messages": MESSAGES}),
]


def full(case: Case, stream: bool) -> dict[str, Any]:
    """The body as it is sent."""
    given = {name: value for name, value in case.body.items() if stream or name != "stream_options"}
    return {"model": MODEL, **given, "stream": stream}
