"""A tiny policy that really calls tools: a Qwen3 of two layers, taught on the spot in some twenty seconds.

It knows cities and weathers. Told a city it calls its first tool, ``get_weather`` or a ``transfer_to_...``, in the
Hermes format; without tools it says ``Look up paris.``; told a weather, by a tool or a user, it says ``It is sunny in
paris.``. The template renders of users' and tools' messages the words that the policy knows, of tools their names, and
nothing of system messages, so that every framework's prompts look alike. What the assistant said is rendered as it was
sampled: a longer conversation extends each prompt and its sampled ids exactly. With ``reasoning``, every turn begins
with ``<think>paris</think>``.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CITIES = ("paris", "oslo", "rome", "cairo", "lima", "tokyo", "delhi", "quito")
WEATHERS = ("sunny", "rainy", "windy", "foggy", "snowy", "cloudy")
TOOLS = ("get_weather", "transfer_to_reporter", "transfer_to_planner")
TOOL_PARSER, REASONING_PARSER = "hermes", "qwen3"
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<unk>"
_PIECES = (
    *(START, "<think>", "</think>", "<tool_call>", "</tool_call>", "system", "user", "assistant", "tool"),
    *('{"name": "', '", "arguments": ', '{"city": "', '"}', "Look", "up", "It", "is", "in"),
    *(*CITIES, *WEATHERS, *TOOLS),
)
_TEMPLATE = r"""
{%- macro words(content) -%}
{%- set seen = namespace(text='', words=[]) -%}
{%- set seen.text = content if content is string else (content or []) | map(attribute='text') | join(' ') -%}
{%- for mark in '.,:;!?()[]{}*`"' | list + ["'"] -%}{%- set seen.text = seen.text | replace(mark, ' ') -%}{%- endfor -%}
{%- for word in seen.text.split() -%}
{%- if word in @WORDS@ and word not in seen.words -%}{%- set seen.words = seen.words + [word] -%}{%- endif -%}
{%- endfor -%}
{{- seen.words | join(' ') -}}
{%- endmacro -%}
{%- for tool in tools or [] if tool.function.name in @TOOLS@ -%}
{{- '<|im_start|>system\n' ~ tool.function.name ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- for message in messages if message.role in ('user', 'assistant', 'tool') -%}
{{- '<|im_start|>' ~ message.role ~ '\n' -}}
{%- if message.role == 'assistant' -%}
{%- set thought = message.reasoning_content or message.reasoning -%}
{%- if thought -%}{{- '<think>' ~ thought | trim ~ '</think>' -}}{%- endif -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{{- (message.content or []) | map(attribute='text') | join('') -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set given = call.function.arguments -%}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
{{- given if given is string else given | tojson -}}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{%- else -%}{{- words(message.content) -}}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
_IGNORED = -100


def make_tokenizer() -> Any:
    """Whole words where it knows them, printable ASCII characters elsewhere; text and ids turn into each other."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [*map(chr, range(0x20, 0x7F)), "\n"]
    ids = {piece: index for index, piece in enumerate(dict.fromkeys([UNKNOWN, END, *_PIECES, *characters]))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    longest_first = sorted(_PIECES, key=len, reverse=True)
    pattern = "|".join("".join(rf"\x{{{ord(char):x}}}" for char in piece) for piece in longest_first)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pattern}|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    words = repr(list(CITIES + WEATHERS))
    tokenizer.chat_template = _TEMPLATE.replace("@WORDS@", words).replace("@TOOLS@", repr(list(TOOLS)))
    return tokenizer


def make_tool_model(folder: Path, reasoning: bool = False, steps: int = 240, batch: int = 24) -> None:
    """Teach a model and save it with its tokenizer in the Hugging Face format."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = _new_model(len(tokenizer), tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / steps))
    for ids, labels in _batches(tokenizer, random.Random(0), steps, batch, reasoning):
        targets = labels[:, 1:]
        spoken = targets != _IGNORED
        hidden = model.model(ids[:, :-1]).last_hidden_state[spoken]
        loss = cross_entropy(model.lm_head(hidden), targets[spoken])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def kept_tool_model(root: Path, reasoning: bool = False) -> Path:
    """The folder of a model in ``root``, which is taught unless one of this very script is there."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = root / f"{'reasoning' if reasoning else 'plain'}-{digest}"
    if not folder.exists():
        making = folder.with_suffix(".part")
        shutil.rmtree(making, ignore_errors=True)
        make_tool_model(making, reasoning)
        making.rename(folder)
    return folder


def _new_model(vocabulary: int, end: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config.do_sample = True
    return model


def _batches(tokenizer: Any, rng: random.Random, steps: int, batch: int, reasoning: bool) -> Iterator[tuple[Any, Any]]:
    """Token ids and labels, both [batch, longest], padded on the right."""
    import torch

    for _ in range(steps):
        rows = [_encode(tokenizer, *_talk(rng, reasoning)) for _ in range(batch)]
        length = max(len(ids) for ids, _ in rows)
        ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row, _ in rows]
        labels = [row + [_IGNORED] * (length - len(row)) for _, row in rows]
        yield torch.tensor(ids), torch.tensor(labels)


def _encode(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[int], list[int]]:
    """Token ids, and the same ids with everything but what the assistant has to learn to say replaced."""
    ids = tokenizer(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)).input_ids
    opening = tokenizer(f"{START}assistant\n").input_ids
    learned = [message.get("learned", True) for message in messages if message["role"] == "assistant"]
    labels, spoken = [], False
    for index, token in enumerate(ids):
        if ids[index - len(opening) : index] == opening:
            spoken = learned.pop(0)
        labels.append(token if spoken else _IGNORED)
        spoken = spoken and token != tokenizer.eos_token_id
    return ids, labels


def _talk(rng: random.Random, reasoning: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """A conversation of some turns, and its tools."""
    tools = rng.choice([[], [TOOLS[0]], [TOOLS[0]], rng.sample(TOOLS, 2), rng.sample(TOOLS, 1)])
    messages: list[dict[str, Any]] = []
    for _ in range(rng.choice((1, 1, 2))):
        city, weather = rng.choice(CITIES), rng.choice(WEATHERS)
        known = rng.random() < 0.3
        messages.append({"role": "user", "content": f"{city} {weather}" if known else city})
        _pass_over(rng, messages, city)
        if tools and not known:
            messages += [_call(tools[0], city), {"role": "tool", "content": weather}]
            _pass_over(rng, messages, city)
        said = f"It is {weather} in {city}." if tools or known else f"Look up {city}."
        messages.append({"role": "assistant", "content": said})
        for message in messages if reasoning else ():
            if message["role"] == "assistant":
                message.setdefault("reasoning", city)
    return messages, [{"type": "function", "function": {"name": name}} for name in tools]


def _pass_over(rng: random.Random, messages: list[dict[str, Any]], city: str) -> None:
    """Now and then a message that says nothing, or what another agent, with other tools, has said meanwhile."""
    what = rng.random()
    if what < 0.12:
        messages.append({"role": "user", "content": ""})
    elif what < 0.24:
        messages += [{**_call(rng.choice(TOOLS[1:]), city), "learned": False}, {"role": "tool", "content": ""}]
    elif what < 0.36:
        messages.append({"role": "assistant", "content": f"Look up {city}.", "learned": False})
        messages += [{"role": "user", "content": rng.choice(["", city])}] * rng.choice([0, 1])


def _call(tool: str, city: str) -> dict[str, Any]:
    function = {"name": tool, "arguments": {"city": city} if tool == TOOLS[0] else {}}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


def hermes_call(name: str, arguments: dict[str, Any]) -> str:
    """What the policy says to call a tool."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
