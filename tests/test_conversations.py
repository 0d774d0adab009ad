"""Conversations of files as the calls that would have sampled them: exact marks, or an error that says where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import lightning_ray as lr
from lightning_ray.conversations.files import Conversation, conversation_of, read_conversations
from lightning_ray.conversations.rendering import Renderer
from lightning_ray.trajectories.join import join_calls
from tests.tokenizers_on_the_spot import byte_level, sentencepiece_like

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% set kept = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m.role + '\n' + kept + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As templates of reasoning models: what was thought in earlier turns is left out."""
TALK = [
    {"role": "user", "content": "the weather in paris"},
    {"role": "assistant", "content": "sunny"},
    {"role": "user", "content": "and in oslo"},
    {"role": "assistant", "content": "rainy again"},
]


def renderer(template: str = CHATML, tokenizer: Any = None, **arguments: Any) -> Renderer:
    chosen = tokenizer or byte_level()
    chosen.chat_template = template
    return Renderer(chosen, {chosen.eos_token_id}, arguments)


def spoken(renderer: Renderer, conversation: Conversation) -> list[list[str]]:
    """Of each row, the texts that are trained on."""
    found = []
    for row in join_calls(renderer.calls(conversation)):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.mask, [0]]).astype(int)))
        runs = zip(edges[::2], edges[1::2], strict=True)
        found.append([renderer._tokenizer.decode(row.token_ids[start:end]) for start, end in runs])
    return found


def talk(*messages: dict[str, Any], **more: Any) -> Conversation:
    return conversation_of(json.dumps({"messages": list(messages), **more}), "talks.jsonl, line 1")


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece_like])
def test_what_the_assistant_said_is_marked_to_its_end_token_and_nothing_else(tokenizer: Any) -> None:
    render = renderer(tokenizer=tokenizer())
    [said] = spoken(render, talk(*TALK))
    assert [text.strip() for text in said] == ["sunny<|im_end|>", "rainy again<|im_end|>"]
    [row] = join_calls(render.calls(talk(*TALK)))
    whole = render._tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert row.token_ids.tolist() == whole[: len(row.token_ids)], "the ids are the template's own"


def test_a_message_without_weight_is_context() -> None:
    messages = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
    assert spoken(renderer(), talk(*messages)) == [["rainy again<|im_end|>"]]


def test_tool_calls_and_tools_are_rendered() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city": "oslo"}'}}
    messages = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rainy"},
        {"role": "assistant", "content": "rainy"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    conversation = talk(*messages, tools=tools)
    assert spoken(renderer(), conversation) == [['look{"city": "oslo"}<|im_end|>', "rainy<|im_end|>"]]
    [row] = join_calls(renderer().calls(conversation))
    assert '"name": "look"' in renderer()._tokenizer.decode(row.token_ids[:60])


def test_a_template_that_forgets_gives_rows_of_their_own() -> None:
    messages = [TALK[0], {"role": "assistant", "content": "so</think>sunny"}, TALK[2], TALK[3]]
    rows = join_calls(renderer(FORGETFUL).calls(talk(*messages)))
    assert spoken(renderer(FORGETFUL), talk(*messages)) == [["so</think>sunny<|im_end|>"], ["rainy again<|im_end|>"]]
    assert "so" not in renderer()._tokenizer.decode(rows[1].token_ids)


def test_an_answer_that_would_melt_into_its_prompt_is_encoded_alone() -> None:
    melting = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    render = renderer(melting)
    [call] = render.calls(talk({"role": "user", "content": "the wea"}, {"role": "assistant", "content": "ther"}))
    tokenizer = byte_level()
    assert call.prompt_ids.tolist() == tokenizer("the wea").input_ids
    assert tokenizer.decode(call.sampled_ids) == "ther<|im_end|>"
    assert len(tokenizer("the weather").input_ids) < len(call.prompt_ids) + len(call.sampled_ids) - 1


def test_a_template_without_exact_marks_is_refused() -> None:
    thinking = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    with pytest.raises(lr.ConfigError, match=r"line 1, message 1: the chat template does not tell .* '<think>'"):
        renderer(thinking).calls(talk(*TALK))
    arguments = thinking.replace("{% if add_gen", "{% if not plain and add_gen") + (
        "{% if plain and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert renderer(arguments, plain=True).calls(talk(*TALK))
    endless = CHATML.replace("<|im_end|>", "</s>")
    with pytest.raises(lr.ConfigError, match=r"message 1: the chat template ends the assistant's message with"):
        renderer(endless).calls(talk(*TALK))
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(lr.ConfigError, match="refuses the messages up to here: roles must alternate"):
        renderer(refusing).calls(talk(*TALK))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "no JSON"),
        ('{"prompt": "hi"}', 'has no "messages"'),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "message 0: is .*robot.*give an object with a role"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "hi", "weight": 0}]}', "no message of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "hi", "weight": 2}]}', '"weight" is 2'),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "parts that are no text"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}', "a tool call is"),
        ('{"messages": [{"role": "assistant", "content": "hi"}], "tools": {}}', '"tools" is dict'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n\n" + line + "\n")
    with pytest.raises(lr.ConfigError, match=rf"talks\.jsonl, line 3.*{complaint}"):
        list(read_conversations(file))


def test_a_model_without_a_template_or_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(lr.ConfigError, match="has no chat template"):
        Renderer.of_model(tmp_path / "plain")
    with pytest.raises(lr.ConfigError, match="its tokenizer cannot be loaded"):
        Renderer.of_model(tmp_path / "nowhere")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [1]}')
    assert Renderer.of_model(tmp_path / "chat")._ends == {1, tokenizer.eos_token_id}
