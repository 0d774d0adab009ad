"""The policy deployment as agents reach it, on real Ray, Serve, HAProxy and vLLM, without a trainer.

Its first swap moves no weights, so that those of the model's folder stay; it is proved by plain transformers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lightning_ray.agent_names import AGENT_HEADER
from lightning_ray.capture.keys import Claims, issue_key, operator_key
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings
from lightning_ray.policy.proof import canary_prompts
from lightning_ray.store.base import Store
from tests.tool_model import REASONING_PARSER, TOOL_PARSER

MODEL = "policy"
BODY_MB = 1
SETTINGS = EngineSettings(
    max_model_len=512,
    kv_cache_memory_mb=16,
    max_body_mb=BODY_MB,
    tool_parser=TOOL_PARSER,
    reasoning_parser=REASONING_PARSER,
)


@dataclass
class Served:
    """A deployment at work."""

    cluster: Cluster
    store: Store
    root: str
    """Of HTTP addresses, without a path."""
    tokenizer: Any
    oracle: Any
    """The model in plain transformers."""

    async def attempt(self, agent: str | None = None, **sampling: Any) -> Session:
        """A fresh attempt; its key fixes ``sampling``."""
        begun = await self.store.start_rollout({"question": "paris"})
        claims = Claims(begun.rollout_id, begun.attempt.attempt_id, time.time() + 600, sampling)
        return Session(self, begun.rollout_id, begun.attempt.attempt_id, issue_key(self.cluster.secret, claims), agent)

    def operator(self) -> dict[str, str]:
        """Headers that open the status."""
        return {"authorization": f"Bearer {operator_key(self.cluster.secret, 600)}"}

    def text(self, token_ids: list[int]) -> str:
        """What ids say, special tokens included."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def logprobs(self, prompt_ids: list[int], sampled_ids: list[int]) -> list[float]:
        """What plain transformers say of sampled ids."""
        return logprobs(self.oracle, prompt_ids + sampled_ids)[len(prompt_ids) - 1 :]


@dataclass
class Session:
    """One attempt, and how an agent of it calls."""

    served: Served
    rollout_id: str
    attempt_id: str
    key: str
    agent: str | None = None

    @property
    def address(self) -> str:
        """The attempt's own base URL, without ``/v1``."""
        path = f"/rollout/{self.rollout_id}/attempt/{self.attempt_id}"
        return self.served.root + path + (f"/agent/{self.agent}" if self.agent else "")

    @property
    def base(self) -> str:
        """What OpenAI's clients take as base URL."""
        return f"{self.address}/v1"

    @property
    def headers(self) -> dict[str, str]:
        """Of a client that knows no SDK."""
        return {"authorization": f"Bearer {self.key}"}

    def named(self, agent: str) -> dict[str, str]:
        """The headers, with an agent's name."""
        return {**self.headers, AGENT_HEADER: agent}

    async def post(self, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
        """A call without an SDK, to the attempt's own address."""
        async with httpx.AsyncClient(timeout=60) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = self.headers | {"content-type": "application/json"}
            return await client.post(self.address + path, content=content, headers=headers)

    async def spans(self) -> list[dict[str, Any]]:
        """All that the store has of this attempt."""
        return (await self.served.store.scan_spans([self.rollout_id], self.attempt_id)).to_pylist()

    async def calls(self) -> list[dict[str, Any]]:
        """Its model calls, in order, with their attributes unpacked."""
        found = await self.served.store.query_spans(self.rollout_id, self.attempt_id)
        attributes = {span.span_id: span.attributes for span in found}
        rows = [row for row in await self.spans() if row["prompt_ids"] is not None]
        return [{**row, "attributes": attributes[row["span_id"]]} for row in rows]


async def serve(model: Path, folder: Path, cluster: Cluster, settings: EngineSettings = SETTINGS) -> Served:
    """Start it all; the caller stops the cluster."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cluster.start_ray()
    store = cluster.start_store(folder)
    endpoint = await cluster.start_policy(model, MODEL, settings)
    await cluster.replicas("begin_swap")
    await cluster.replicas("end_swap", 0)
    [member] = await cluster.replicas("describe")
    canaries = canary_prompts(member["vocabulary"])
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    expected = [logprobs(oracle, ids) for ids in canaries]
    [proof] = await cluster.replicas("prove", 0, canaries, expected, settings.chosen_tolerance)
    assert proof["max_logprob_diff"] <= settings.chosen_tolerance
    root = endpoint.endpoint.removesuffix("/v1")
    return Served(cluster, store, root, AutoTokenizer.from_pretrained(model), oracle)


def logprobs(model: Any, token_ids: list[int]) -> list[float]:
    """log p(token | those before it) of tokens 1.. by plain transformers."""
    import torch

    ids = torch.tensor(token_ids)
    with torch.no_grad():
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[1:, None])[:, 0].tolist()
