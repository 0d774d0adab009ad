"""A tiny random model with a byte-level BPE tokenizer, and prompts in its made-up language.

Sampled at temperature 1 it says any ids, so that the tokenizer would nearly always read its text as other ids. Its
bytes are ASCII alone: every text of its is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.spans import SpanMaker

VOCABULARY = 4_000
LONGEST = 1_024
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(folder: Path) -> None:
    """A Qwen3 of two layers, in Hugging Face's format."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=LONGEST,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).float().save_pretrained(folder)


def make_tokenizer() -> Any:
    """Byte-level BPE, its merges learned from the made-up language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    core.train_from_iterator(["user\nassistant\nsystem\n", *islice(texts(0), 3000)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(seed: int) -> Iterator[str]:
    """Texts of 60 words, without end."""
    maker = SpanMaker(seed)
    while True:
        for message in maker.span(("", ""))["attributes"]["gen_ai.request.messages"]:
            yield message["content"]


def prompts(tokenizer: Any, count: int, tokens: int) -> list[list[dict[str, str]]]:
    """Messages of a system and a user, different ones, whose prompts have so many tokens (or up to two more)."""
    found = []
    source = texts(1)
    while len(found) < count:
        words = " ".join(islice(source, 20)).split(" ")
        low, high = 1, len(words)
        while low < high:
            middle = (low + high) // 2
            if _length(tokenizer, words[:middle]) < tokens:
                low = middle + 1
            else:
                high = middle
        if tokens <= _length(tokenizer, words[:low]) <= tokens + 2:
            found.append(_messages(words[:low]))
    return found


def _messages(words: list[str]) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": " ".join(words[:20])},
        {"role": "user", "content": " ".join(words[20:])},
    ]


def _length(tokenizer: Any, words: list[str]) -> int:
    text = tokenizer.apply_chat_template(_messages(words), tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(text, add_special_tokens=False))
