"""LoRA: a swap moves the adapter alone, and the engine then computes with the trainer's adapter, proved.

Real Ray, Serve, vLLM in a process of its own, as on GPUs, and two FSDP2 ranks; one cluster for all tests of this file,
in their order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio
import ray

from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings
from lightning_ray.policy.parts import LoraSettings
from lightning_ray.policy.proof import differing_kinds
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.swap import PolicySwapper, Swap
from lightning_ray.store.base import Store
from lightning_ray.store.packing import unpack
from lightning_ray.together import together
from lightning_ray.types import ProxyLLM
from tests.e2e.tiny import make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
TOLERANCE = 1e-4
LORA = LoraSettings(rank=3, alpha=12.0)
ENGINE = EngineSettings(process="own", adapter_rank=3, max_model_len=256, kv_cache_memory_mb=16)
SHAPES = {  # of a layer of the tiny model: outputs, inputs
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
ADAPTER_BYTES = 4 * 2 * LORA.rank * sum(out + into for out, into in SHAPES.values())
"""Two layers of float32."""
LONG = " ".join(f"w{index % 12}" for index in range(150))
"""More than a block of the engine's cache."""


class Policy:
    """A trained policy without a run around it."""

    def __init__(self, cluster: Cluster, store: Store, endpoint: ProxyLLM, swapper: PolicySwapper):
        self.cluster = cluster
        self.store = store
        self.endpoint = endpoint
        self.swapper = swapper
        self.version = 0

    async def publish(self) -> Swap:
        self.version += 1
        return await asyncio.wait_for(self.swapper.publish(self.version), 120)

    async def at_ranks(self, change: Callable[[Any], Any]) -> list[Any]:
        return await asyncio.gather(*(rank.__ray_call__.remote(change) for rank in self.cluster.trainers.ranks))

    async def say(self, tokens: int, prompt: str = LONG) -> dict[str, Any]:
        """One captured call: its span."""
        begun = await self.store.start_rollout({})
        ids = begun.rollout_id, begun.attempt.attempt_id
        key = issue_key(self.cluster.secret, Claims(*ids, time.time() + 600))
        client = openai.AsyncOpenAI(base_url=self.endpoint.get_base_url(*ids), api_key=key, max_retries=0)
        asked: Any = {"ignore_eos": True}
        messages: Any = [{"role": "user", "content": prompt}]
        await client.chat.completions.create(model="policy", messages=messages, max_tokens=tokens, extra_body=asked)
        [span] = (await self.store.scan_spans([ids[0]], ids[1])).to_pylist()
        return {**span, **unpack(span["more"])["attributes"]["usage"]}

    async def gap(self, span: dict[str, Any], version: int) -> float:
        """Largest difference to the trainer's logprobs of the tokens that a version sampled."""
        whole = span["prompt_ids"] + span["sampled_ids"]
        [ours] = await self.cluster.trainers.logprobs([whole])
        gaps = np.abs(ours[len(span["prompt_ids"]) - 1 :] - np.array(span["logprobs"]))
        return float(gaps[np.array(span["weight_versions"]) == version].max())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def policy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Policy]:
    folder = tmp_path_factory.mktemp("adapter")
    make_tiny_model(folder / "model")
    cluster = Cluster()
    cluster.start_ray()
    try:
        store = cluster.start_store(folder / "store")
        update = UpdateSettings(model_path=str(folder / "model"), lora=LORA)
        endpoint, _ = await together(
            cluster.start_policy(Path(folder / "model"), "policy", ENGINE),
            cluster.start_trainers(update, 2, ENGINE.chosen_transfer),
        )
        swapper = await cluster.connect(ENGINE)
        policy = Policy(cluster, store, endpoint, swapper)
        await swapper.publish(0)
        yield policy
    finally:
        await cluster.stop()


def another_adapter(rank: Any) -> None:
    """B is no longer 0."""
    import torch

    with torch.no_grad():
        for name, weight in rank.updater._engine.module.named_parameters():
            if ".lora_" in name:
                weight.to_local().normal_(std=0.2)


async def test_a_swap_moves_the_adapter_alone_and_every_token_is_then_its(policy: Policy) -> None:
    before = await policy.say(40)
    assert await policy.gap(before, 0) < TOLERANCE
    await policy.at_ranks(another_adapter)
    assert await policy.gap(before, 0) > 100 * TOLERANCE, "the adapter makes no difference"
    swap = await policy.publish()
    assert swap.bytes == ADAPTER_BYTES and not swap.mended
    assert swap.max_logprob_diff < TOLERANCE
    after = await policy.say(40)  # the same prompt, whose keys and values were cached under the old adapter
    assert set(after["weight_versions"]) == {1}
    assert await policy.gap(after, 1) < TOLERANCE
    again = await policy.say(40)
    assert again["cached_tokens"] > 0, "prefixes are cached under an adapter too"
    assert await policy.gap(again, 1) < TOLERANCE


async def test_answers_in_flight_go_on_under_the_new_adapter(policy: Policy) -> None:
    await policy.at_ranks(another_adapter)
    answers = [asyncio.create_task(policy.say(240, f"w{index} w2")) for index in range(4)]
    async with asyncio.timeout(30):
        while (await policy.cluster.replicas("status"))[0]["running"] < 4:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # a few tokens of each
    old = policy.version
    await policy.publish()
    spans = await asyncio.gather(*answers)
    mixed = [span for span in spans if set(span["weight_versions"]) == {old, old + 1}]
    assert mixed, "no answer was being sampled during the swap"
    for span in mixed:
        assert await policy.gap(span, old + 1) < TOLERANCE
        assert await policy.gap(span, old) > 10 * TOLERANCE, "what was sampled before is the old adapter's"


def spoiling(spoil: Callable[[list[Any], list[Any]], None]) -> Callable[[Any], None]:
    """Spoils what the next export hands out."""

    def change(rank: Any) -> None:
        export = rank.publisher.export

        def spoiled(*chunk: int) -> Any:
            offer = export(*chunk)
            rank.publisher.export = export
            if offer is None:
                return None
            parts, layout = [part.copy() for part in ray.get(offer["weights"][0])], list(offer["layout"])
            spoil(parts, layout)
            return {**offer, "weights": [ray.put(parts)], "layout": layout}

        rank.publisher.export = spoiled

    return change


def place_of(layout: list[Any], part: str) -> int:
    return next(index for index, (name, _, _) in enumerate(layout) if part in name)


def flip(parts: list[Any], layout: list[Any]) -> None:
    values = parts[place_of(layout, "1.mlp.down_proj.lora_A")].view("float32")
    values *= -1


def drop(parts: list[Any], layout: list[Any]) -> None:
    index = place_of(layout, "0.self_attn.q_proj.lora_B")
    del parts[index], layout[index]


def drop_both(parts: list[Any], layout: list[Any]) -> None:
    for _ in range(2):
        index = place_of(layout, "0.mlp.up_proj.lora_")
        del parts[index], layout[index]


def rename(parts: list[Any], layout: list[Any]) -> None:
    index = place_of(layout, "0.mlp.up_proj.lora_A")
    name, *rest = layout[index]
    layout[index] = (name.replace("up_proj", "side_proj"), *rest)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (flip, "did not prove version"),
        (drop_both, "did not prove version"),
        (drop, "the adapter has no model.layers.0.self_attn.q_proj.lora_B"),
        (rename, "the adapter has no model.layers.0.mlp.side_proj.lora_B"),
    ],
)
async def test_an_adapter_that_was_spoiled_is_refused_and_sent_again(policy: Policy, spoil: Any, told: str) -> None:
    await policy.at_ranks(another_adapter)
    await policy.at_ranks(spoiling(spoil))
    swap = await policy.publish()
    assert len(swap.mended) == 1 and told in swap.mended[0]
    [member] = await policy.cluster.replicas("describe")
    assert member["proved"] and member["version"] == policy.version
    assert await policy.gap(await policy.say(20), policy.version) < TOLERANCE


async def test_the_probes_see_what_the_engine_computes_with_its_adapter(policy: Policy) -> None:
    [ours, _] = await policy.cluster.trainers.call("probes", timeout=60.0)
    [theirs] = await policy.cluster.replicas("probes")
    found = theirs["probes"]
    assert {name for name in ours if name not in found} == set()
    assert differing_kinds(ours, found) == {}
