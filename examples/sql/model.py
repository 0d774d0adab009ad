"""A policy made on the spot: a Qwen3 of 0.35 million parameters and a tokenizer of whole words.

Invariants: any sequence of ids without the end token survives decoding and encoding unchanged, because every
other token is an ordinary word between spaces; and the template of a longer conversation extends, id for id,
the prompt and the sampled ids of each turn before. Training is left to the warm start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.sql.task import AGGREGATES, COMPARISONS, DONE, ORDERS, PEOPLE, SYNONYMS, TABLES

START, END = "<|im_start|>", "<|im_end|>"
LARGEST_NUMBER = 349
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|> {{ message['role'] }} {{ message['content'] or '' }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)

_QUESTION_WORDS = "what is the who has how many in have ?"
_SQL_WORDS = f"SELECT name FROM WHERE ORDER BY LIMIT count( * ) , {DONE}"
_ANSWER_WORDS = "rows none null | error: no such column: table: near syntax error incomplete input ; columns"


def vocabulary() -> list[str]:
    """The words of the task, by id; id 0 stands for any other."""
    names = [*SYNONYMS, *(name for names in SYNONYMS.values() for name in names), *TABLES, *PEOPLE]
    words = [
        *AGGREGATES,
        *AGGREGATES.values(),
        *ORDERS,
        *ORDERS.values(),
        *COMPARISONS,
        *COMPARISONS.values(),
    ]
    fixed = f"<unk> {END} {START} system user assistant {_QUESTION_WORDS} {_SQL_WORDS} {_ANSWER_WORDS}".split()
    return list(dict.fromkeys([*fixed, *names, *words, *map(str, range(LARGEST_NUMBER + 1))]))


def make_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` with its chat template; the end of a turn is its only special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(seed: int, std: float = 0.09) -> Any:
    """An untrained `Qwen3ForCausalLM` in float32.

    `std` is that of the initial weights. With the usual 0.02, copying from the tool's answer is not learned.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    end = vocabulary().index(END)
    config = Qwen3Config(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config.do_sample = True
    return model


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both in the Hugging Face format, loadable by transformers and vLLM."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
