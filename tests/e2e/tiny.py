"""A policy small enough to learn while one waits, and scripts and agents around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

import lightning_ray as lr

WORDS = [f"w{index}" for index in range(12)]
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_tiny_model(folder: Path, seed: int = 0) -> None:
    """A random Qwen3 of 60k parameters with tied embeddings and a vocabulary of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


@lr.rollout
async def two_turns(task: dict[str, Any], llm: lr.LLM) -> float:
    """Two model turns with a tool's answer between them; the reward is the share of even words in both."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    said: list[str] = []
    for _ in range(2):
        answer = await client.chat.completions.create(
            model=llm.model,
            messages=messages,
            max_tokens=task["length"],
            # A random model says special tokens too; left out of the text, they would break the prefix.
            extra_body={"skip_special_tokens": False},
        )
        text = answer.choices[0].message.content or ""
        said += text.split()
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "w1 w2"}]
    return sum(word in WORDS[::2] for word in said) / max(1, len(said))


@lr.rollout
async def one_word(task: dict[str, Any], llm: lr.LLM) -> float:
    """One word; rewarded if it is w7."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    answer = await client.chat.completions.create(
        model=llm.model, messages=[{"role": "user", "content": task["question"]}], max_tokens=1
    )
    return float((answer.choices[0].message.content or "").strip() == "w7")


@lr.rollout
async def raises(task: dict[str, Any], llm: lr.LLM) -> float:
    """An agent with a defect."""
    raise KeyError("the agent's own defect")


@lr.rollout
async def returns_text(task: dict[str, Any], llm: lr.LLM) -> str:
    """An agent that returns no number."""
    return "a string"


AGENTS = {"one_word": one_word, "raises": raises, "returns_text": returns_text}
