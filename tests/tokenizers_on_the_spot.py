"""Small tokenizers of the kinds that models have, made on the spot, each with ``<|im_start|>`` and ``<|im_end|>``."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<unk>"
SPECIAL = [UNKNOWN, START, END]
CORPUS = (
    "the weather in paris is sunny today and the weather in oslo is rainy\n"
    "user assistant system tool call the tool again and again until the answer is there\n"
    "über größe naïve café – 日本語 日本 天気 🙂 🙃 👩‍👩‍👧\n"
) * 20


def wrapped(core: Tokenizer) -> Any:
    """As transformers has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, unk_token=UNKNOWN, additional_special_tokens=[START]
    )


@cache
def byte_level() -> Any:
    """As GPT's, Llama 3's and Qwen's: merges over bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([CORPUS], trainer)
    return wrapped(core)


@cache
def sentencepiece_like() -> Any:
    """As Llama 2's and Gemma's: merges over characters, spaces written as a mark, bytes for what is unknown."""
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        limit_alphabet=40,
    )
    core.train_from_iterator([CORPUS.replace(" ", "▁")], trainer)
    model = json.loads(core.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    core.model = models.BPE(model["vocab"], merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(only_these_added(core))


@cache
def unigram() -> Any:
    """As T5's: the likeliest pieces, spaces written as a mark."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False)
    core.train_from_iterator(CORPUS.splitlines(), trainer)
    return wrapped(core)


@cache
def word_level() -> Any:
    """Whole words; the text has one space between any two tokens."""
    words = dict.fromkeys([*SPECIAL, *CORPUS.split(), "wea", "ther"])
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(core)


def only_these_added(core: Tokenizer) -> Tokenizer:
    """Without the trainer's other special tokens, which are pieces like any."""
    description = json.loads(core.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(description))


def encode(tokenizer: Any, text: str) -> list[int]:
    """The canonical ids."""
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text, special tokens and all."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def spelled(tokenizer: Any, text: str) -> list[int]:
    """The same text by the smallest pieces: bytes of ``byte_level``, characters of ``sentencepiece_like``."""
    if tokenizer is byte_level():
        alphabet = dict(zip(range(256), _byte_letters(), strict=True))
        return tokenizer.convert_tokens_to_ids([alphabet[byte] for byte in text.encode()])
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for character in text.replace(" ", "▁"):
        ids += [vocabulary[character]] if character in vocabulary else _by_bytes(vocabulary, character)
    return ids


def _by_bytes(vocabulary: dict[str, int], character: str) -> list[int]:
    return [vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()]


@cache
def _byte_letters() -> list[str]:
    """The letter that stands for each byte, as GPT-2 has them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
