"""Conversations with a random model behind the policy deployment's own app, in this process: how many turns drift.

``python -m tests.e2e.wire.continuation FOLDER`` prints, with continuation and without, the turns whose prompt does not
begin with the tokens before it. Turns that ended amid a character, whose text lacks it, are left out.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from deployments.policy import Policy
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.config import EngineSettings
from lightning_ray.store import LocalStoreClient, SpanStore
from tests.tokenizers_on_the_spot import END, START, byte_level

SECRET = b"s" * 32
MODEL = "policy"
CONVERSATIONS, TURNS, TOKENS = 8, 5, 24
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS = EngineSettings(max_model_len=512, kv_cache_memory_mb=16)


def make_random_model(folder: Path) -> None:
    """A Qwen3 that says anything, over bytes and their merges."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=0,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


async def converse(client: httpx.AsyncClient, store: Any, spoken: list[int]) -> Counter[str]:
    """One conversation at temperature 1; ``spoken`` are the tokens that may be said."""
    begun = await store.start_rollout({})
    rollout_id, attempt_id = begun.rollout_id, begun.attempt.attempt_id
    key = issue_key(SECRET, Claims(rollout_id, attempt_id, time.time() + 600))
    messages = [{"role": "user", "content": "What is the weather?"}]
    for _ in range(TURNS):
        body = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "allowed_token_ids": spoken}
        answer = await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
        messages.append({"role": "user", "content": "go on"})
    spans = await store.query_spans(rollout_id, attempt_id)
    rows = (await store.scan_spans([rollout_id], attempt_id)).to_pylist()
    counts: Counter[str] = Counter()
    for before, after in itertools.pairwise(rows):
        said = before["prompt_ids"] + before["sampled_ids"]
        amid = byte_level().decode(before["sampled_ids"], skip_special_tokens=True).endswith("\ufffd")
        drifted = after["prompt_ids"][: len(said)] != said
        counts["amid a character" if amid else "whole"] += 1
        counts["drifted"] += drifted and not amid
    counts["restored"] = sum("restored_tokens" in span.attributes for span in spans)
    return counts


async def main(folder: Path) -> None:
    make_random_model(folder / "model")
    store = LocalStoreClient(SpanStore(folder / "store"))
    [own, *_] = Policy.func_or_class.__bases__  # without what Serve wraps around it
    policy: Any = own(str(folder / "model"), MODEL, SETTINGS, store, SECRET)
    edge = await policy.__serve_build_asgi_app__()
    policy.capture.mark_swap(0)
    policy.capture.proved.set()
    tokenizer = byte_level()
    spoken = [
        index for index in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(index) not in (START, "<unk>")
    ]
    found = {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://policy", timeout=60) as client:
        for mode, conversations in (("with", policy.capture.conversations), ("without", None)):
            policy.capture.conversations = conversations
            counts = await asyncio.gather(*(converse(client, store, spoken) for _ in range(CONVERSATIONS)))
            found[mode] = dict(sum(counts, Counter()))
    print(json.dumps(found))
    policy.engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
