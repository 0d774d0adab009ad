"""Spans as agents leave them, made up: model calls with tokens, logprobs, messages and attributes.

Everything comes from a seed. Token ids are uniform in 0..150000 and logprobs have random mantissas, so neither
compresses beyond its range; the text is drawn from a made-up language with the word frequencies of English
and compresses like English (2.5 to 3 times by zstd). No content is repeated between spans, except in a
``conversation``, where each turn's prompt holds all before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_ray.semconv import MODEL_CALL_NAMES

PROMPT, SAMPLED, MESSAGES = 600, 150, 6
VOCABULARY = 150_000
TURN_PROMPT = PROMPT - SAMPLED
"""New tokens in the prompt of a conversation's turn; with the sampled ones, 600 new tokens a turn."""
_MESSAGE_WORDS = 60
_WORDS = 6000
_LETTERS = "etaoinshrdlcumwfgypbvk"

Key = tuple[str, str]
"""Rollout id, attempt id."""


class SpanMaker:
    """Makes spans from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._words = _language(np.random.default_rng(0))
        weights = 1 / np.arange(8.0, _WORDS + 8.0)
        self._cumulative = np.cumsum(weights / weights.sum())

    def span(self, key: Key) -> dict[str, Any]:
        """One model call: 600 prompt tokens, 150 sampled, 6 messages, about 20 attributes."""
        return self._span(key, self._tokens(PROMPT), self._tokens(SAMPLED), self._messages(MESSAGES))

    def conversation(self, key: Key, turns: int) -> tuple[list[dict[str, Any]], int]:
        """A conversation's model calls, and the bytes of what is new in each: tokens (4 a token), logprobs, text."""
        context = self._tokens(0)
        messages: list[dict[str, str]] = []
        spans, unique = [], 0
        for _ in range(turns):
            said = self._messages(MESSAGES - 1)
            messages = messages + said[:-1]
            prompt = np.concatenate([context, self._tokens(TURN_PROMPT)])
            sampled = self._tokens(SAMPLED)
            spans.append(self._span(key, prompt, sampled, [*messages, said[-1]]))
            messages.append(said[-1])
            context = np.concatenate([prompt, sampled])
            unique += 4 * (TURN_PROMPT + SAMPLED) + 4 * SAMPLED
            unique += sum(len(message["content"]) for message in said)
        return spans, unique

    def _tokens(self, count: int) -> np.ndarray:
        return (self._random.random(count) * VOCABULARY).astype(np.int32)

    def _messages(self, count: int) -> list[dict[str, str]]:
        """Turns of user and assistant after a system message, in words of the made-up language."""
        picks = np.searchsorted(self._cumulative, self._random.random(count * _MESSAGE_WORDS))
        texts = self._words[picks].reshape(count, _MESSAGE_WORDS).tolist()
        roles = ["system", *("user", "assistant") * count]
        return [{"role": role, "content": " ".join(words)} for role, words in zip(roles, texts, strict=False)]

    def _span(
        self, key: Key, prompt: np.ndarray, sampled: np.ndarray, messages: list[dict[str, str]]
    ) -> dict[str, Any]:
        ended, seconds = time.time(), self._random.exponential(3.0)
        return {
            "rollout_id": key[0],
            "attempt_id": key[1],
            "sequence_id": 0,
            "trace_id": self._random.bytes(16).hex(),
            "span_id": self._random.bytes(8).hex(),
            "parent_id": self._random.bytes(8).hex(),
            "name": MODEL_CALL_NAMES["chat"],
            "start_time": ended - seconds,
            "end_time": ended,
            "status": "OK",
            "agent": "researcher",
            "model": "policy",
            "prompt_ids": prompt,
            "sampled_ids": sampled,
            "logprobs": -self._random.standard_exponential(len(sampled), dtype=np.float32),
            "weight_versions": np.full(len(sampled), 7, dtype=np.int32),
            "finish_reason": "stop",
            "attributes": {
                "gen_ai.system": "openai",
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": "policy",
                "gen_ai.request.temperature": 1.0,
                "gen_ai.request.top_p": 1.0,
                "gen_ai.request.top_k": -1,
                "gen_ai.request.max_tokens": 512,
                "gen_ai.request.seed": int(self._random.random() * 2**31),
                "gen_ai.request.stop_sequences": ["</answer>"],
                "gen_ai.request.messages": messages,
                "gen_ai.response.id": f"chatcmpl-{self._random.bytes(16).hex()}",
                "gen_ai.response.model": "policy",
                "gen_ai.response.finish_reasons": ["stop"],
                "gen_ai.usage.input_tokens": len(prompt),
                "gen_ai.usage.output_tokens": len(sampled),
                "gen_ai.usage.total_tokens": len(prompt) + len(sampled),
                "server.address": "10.0.3.17",
                "server.port": 8000,
                "http.response.status_code": 200,
                "queue_and_prefill_seconds": seconds / 10,
                "agent.turn": 1 + int(self._random.random() * 10),
            },
        }


def renamed(batch: pa.RecordBatch, keys: Sequence[Key], span_ids: Sequence[str]) -> pa.RecordBatch:
    """The batch as spans of other attempts, under other span ids; token and text columns are not copied."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["rollout_id"] = pa.array([rollout_id for rollout_id, _ in keys], pa.string())
    columns["attempt_id"] = pa.array([attempt_id for _, attempt_id in keys], pa.string())
    columns["span_id"] = pa.array(span_ids, pa.string())
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema)


def _language(random: np.random.Generator) -> np.ndarray:
    """Words, the frequent ones short, of letters as frequent as in English; some end a sentence."""
    weights = np.geomspace(12, 0.8, len(_LETTERS))
    weights /= weights.sum()
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        length = min(12, int(1.5 + np.log2(len(words) + 2) * random.uniform(0.4, 0.95)))
        stop = "." if random.random() < 0.07 else ""
        words["".join(random.choice(list(_LETTERS), length, p=weights)) + stop] = None
    return np.array(list(words), dtype=object)
