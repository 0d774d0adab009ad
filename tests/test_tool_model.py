"""The words of the tool model: its template extends what was sampled, however a client sends it back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.tool_model import END, hermes_call, make_tokenizer

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("get_weather", "unknown_tool")]
CALL = hermes_call("get_weather", {"city": "paris"})
ASKED = [{"role": "system", "content": "In paris?"}, {"role": "user", "content": "What is it like in 'Paris', paris?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def prompt(tokenizer: Any, *messages: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True))


def test_text_and_ids_turn_into_each_other(tokenizer: Any) -> None:
    text = f'<|im_start|>user\nparis {{"x": 1}}{END}\n{CALL}<think>Lookup</think>'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2


def test_a_prompt_shows_what_the_policy_knows(tokenizer: Any) -> None:
    asked = "<|im_start|>system\nget_weather<|im_end|>\n<|im_start|>user\nparis<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(tokenizer, *ASKED) == asked
    parts = [{"type": "text", "text": "(paris)"}]
    assert prompt(tokenizer, {"role": "user", "content": parts}) == asked


@pytest.mark.parametrize("arguments", [{"city": "paris"}, json.dumps({"city": "paris"})])
@pytest.mark.parametrize("content", [None, "", []])
@pytest.mark.parametrize("reasoning", [None, "paris", "\nparis\n"])
def test_a_longer_conversation_extends_what_was_sampled(
    tokenizer: Any, arguments: Any, content: Any, reasoning: str | None
) -> None:
    sampled = (f"<think>{reasoning.strip()}</think>" if reasoning else "") + CALL + END
    function = {"name": "get_weather", "arguments": arguments}
    said = {"role": "assistant", "content": content, "reasoning": reasoning, "tool_calls": [{"function": function}]}
    longer = prompt(tokenizer, *ASKED, said, {"role": "tool", "content": "It is sunny."})
    assert longer.startswith(prompt(tokenizer, *ASKED) + sampled)
    assert longer.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")
