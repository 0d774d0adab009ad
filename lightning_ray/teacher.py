"""A teacher: another model behind an OpenAI-compatible endpoint, asked how likely it holds what the policy sampled.

The completions route is asked to echo a prompt of token ids with their log probabilities and to add nothing
(``prompt``, ``echo``, ``logprobs``, ``max_tokens=0``), as vLLM and others answer it. The ids are the policy's: the
teacher must have the same tokenizer, which is looked at by what it decodes them to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.relay.retrying import may_pass, pause
from lightning_ray.relay.settings import Upstream

if TYPE_CHECKING:
    import httpx

AT_ONCE = 32
"""Requests at a time, unless the upstream's ``max_concurrent`` is less."""
SAMPLED_IDS, IDS_A_PROMPT = 512, 64
"""Ids of the vocabulary whose text is compared, and how many of them are sent at a time."""
SHOWN = 200
LEAST = -30.0
"""Nats. What a teacher holds for less likely, or for impossible (vLLM says -9999), counts as this: one such token must
not outweigh a batch."""


class Teacher:
    """Scores sequences of token ids; for threads. ``upstream.max_concurrent``, its retries and time limits hold."""

    def __init__(self, upstream: Upstream) -> None:
        """Raises ConfigError if the key's variable is not set, or the upstream names no model."""
        import httpx

        if upstream.model is None or upstream.kind != "openai":
            raise ConfigError(
                f"teacher={upstream.base_url!r}: give lr.Upstream(base_url='http://.../v1', model=...) of an endpoint "
                "that speaks OpenAI's API"
            )
        self._upstream = upstream
        self._client = httpx.Client(
            headers=upstream.own_headers(), timeout=httpx.Timeout(upstream.timeout_seconds, connect=15.0)
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """log p(token | tokens before it), in nats, of each sequence: float32, at least LEAST, 0 for the first token.

        Raises ConfigError for what the endpoint refuses, InfrastructureError if it cannot be reached or keeps failing.
        """
        with ThreadPoolExecutor(min(AT_ONCE, self._upstream.max_concurrent)) as pool:
            return list(pool.map(self._score, sequences))

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises ConfigError if the teacher reads ids of the policy's tokenizer as other text."""
        for ids in _samples(tokenizer):
            theirs, ours = str(self._ask(ids).get("text") or ""), tokenizer.decode(ids)
            if theirs.split() != ours.split():
                raise ConfigError(
                    f"teacher {self._upstream.model!r} has another tokenizer than the policy: token ids {ids[:4]}... "
                    f"are {theirs[:SHOWN]!r} to it and {ours[:SHOWN]!r} to the policy. Distillation compares tokens "
                    "one by one: take a teacher of the same family of models"
                )

    def _score(self, ids: Sequence[int]) -> np.ndarray:
        told = (self._ask(ids).get("logprobs") or {}).get("token_logprobs")
        if not isinstance(told, list) or len(told) < len(ids) or None in told[1 : len(ids)]:
            raise ConfigError(
                f"teacher {self._upstream.base_url}: its completions have no log probability for each token of the "
                "prompt (echo=true, logprobs=1, max_tokens=0); vLLM's server has them"
            )
        return np.maximum(np.array([0.0, *told[1 : len(ids)]], np.float32), LEAST)

    def _ask(self, ids: Sequence[int]) -> dict[str, Any]:
        """The one choice of a completion that adds nothing to the ids."""
        request = {"model": self._upstream.model, "prompt": list(map(int, ids)), "echo": True, "logprobs": 1}
        response = self._tried({**request, "max_tokens": 0, "temperature": 1.0})
        if response.status_code >= 400:
            said = f"{response.status_code} {response.text[:SHOWN]}"
            if may_pass(response.status_code, response.headers):
                raise InfrastructureError(f"teacher {self._upstream.base_url} goes on failing: {said}; resume later")
            raise ConfigError(f"teacher {self._upstream.base_url} refuses {len(ids)} token ids to score: {said}")
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def _tried(self, request: dict[str, Any]) -> httpx.Response:
        """The answer, after retries where they help: the last one, whatever it is."""
        import httpx

        url, began, tried = self._upstream.url("/v1/completions"), time.monotonic(), 0
        while True:
            response = None
            try:
                response = self._client.post(url, json=request)
                if not may_pass(response.status_code, response.headers):
                    return response
                failure, wait = f"{response.status_code}", pause(tried, response.headers)
            except httpx.HTTPError as error:
                failure, wait = f"{type(error).__name__}: {error}", pause(tried, {})
            tried += 1
            if tried > self._upstream.retries or time.monotonic() + wait - began > self._upstream.retry_seconds:
                if response is not None:
                    return response
                raise InfrastructureError(
                    f"teacher {self._upstream.base_url} cannot be reached ({tried} tries, the last: {failure}); see "
                    "that it is up, then resume"
                )
            time.sleep(wait)


def _samples(tokenizer: Any) -> list[list[int]]:
    """Ordinary ids from all over the vocabulary, the last among them, in portions."""
    special = set(tokenizer.all_special_ids)
    spread = np.unique(np.linspace(0, len(tokenizer) - 1, SAMPLED_IDS).astype(int)).tolist()
    ids = [each for each in spread if each not in special and "\ufffd" not in tokenizer.decode([each])]
    return [ids[first : first + IDS_A_PROMPT] for first in range(0, len(ids), IDS_A_PROMPT)]
