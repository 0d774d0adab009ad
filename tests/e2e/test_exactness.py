"""The whole chain is exact: engine, capture, store, trajectories, two trainer ranks, swaps on two replicas.

Real Ray, Serve, vLLM and FSDP2; one cluster for all tests of this file, in their order.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import pyarrow.compute as pc
import pytest
import pytest_asyncio
import ray

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.errors import SwapError
from lightning_ray.policy.transfer import canaries_of
from lightning_ray.run.run import Run
from lightning_ray.store import StoreClient
from lightning_ray.trajectories.account import batch_of, settle
from lightning_ray.trajectories.episode import Episode
from tests.e2e.started import started
from tests.e2e.tiny import make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
TOLERANCE = 1e-4
RUNNERS = RunnerSettings(minimum=2, maximum=2, concurrency=32)
TASKS = [{"question": f"w{i} w{i + 1}", "length": 8} for i in range(6)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    settings = GRPO(
        model=make_tiny_model,
        ranks=2,
        learning_rate=1e-2,
        warmup_steps=0,
        engine=EngineSettings(replicas=2, max_model_len=128, kv_cache_memory_mb=16),
    )
    async with started(tmp_path_factory.mktemp("runs") / "exact", settings, TASKS, RUNNERS) as run:
        yield run


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def played(run: Run) -> tuple[list[Episode], dict[str, str]]:
    return await run.play_groups(TASKS, 4, sampled=True)


async def trainer_logprobs(run: Run, sequences: list[np.ndarray]) -> list[np.ndarray]:
    return await run.cluster.trainers.logprobs([[int(t) for t in s] for s in sequences])


async def worst_gap(run: Run, episodes: list[Episode]) -> float:
    """Largest difference between the engine's logprob of a sampled token and the trainer's."""
    rows = [t for episode in episodes for t in episode.trajectories]
    found = await trainer_logprobs(run, [row.token_ids for row in rows])
    return max(
        float(np.abs(row.logprobs[1:] - logprobs)[row.mask[1:] == 1].max())
        for row, logprobs in zip(rows, found, strict=True)
    )


async def test_every_rollout_is_one_trajectory_with_the_tools_tokens_masked(
    run: Run, played: tuple[list[Episode], dict[str, str]]
) -> None:
    episodes, _ = played
    spans = await run.store.scan_spans([episode.rollout_id for episode in episodes])
    calls = spans.filter(pc.is_valid(spans["prompt_ids"]))
    for episode in episodes:
        assert episode.rollout.status == "succeeded" and episode.reward is not None
        assert episode.calls == 2 and len(episode.trajectories) == 1
        [trajectory] = episode.trajectories
        first, second = calls.filter(pc.equal(calls["rollout_id"], episode.rollout_id)).to_pylist()
        assert trajectory.token_ids.tolist() == second["prompt_ids"] + second["sampled_ids"]
        assert trajectory.token_ids[trajectory.mask == 1].tolist() == first["sampled_ids"] + second["sampled_ids"]
        assert (
            trajectory.logprobs[trajectory.mask == 1].tolist()
            == np.float32(first["logprobs"] + second["logprobs"]).tolist()
        )
        begins = len(first["prompt_ids"])
        assert trajectory.mask[:begins].sum() == 0
        tool = len(second["prompt_ids"]) - begins - len(first["sampled_ids"])
        assert tool >= 6 and (trajectory.mask == 0).sum() == begins + tool


async def test_the_trainer_agrees_with_the_engine_on_every_token(
    run: Run, played: tuple[list[Episode], dict[str, str]]
) -> None:
    assert await worst_gap(run, played[0]) < TOLERANCE


async def test_the_batch_holds_what_the_engine_returned(run: Run, played: tuple[list[Episode], dict[str, str]]) -> None:
    episodes, group_of = played
    account = settle(episodes, group_of)
    assert len(account.trained) + len(account.dropped) == len(episodes) and account.trained
    batch = batch_of(account.trained, group_of).to_pylist()
    trajectories = [t for episode in account.trained for t in episode.trajectories]
    for row, trajectory in zip(batch, trajectories, strict=True):
        assert row["token_ids"] == trajectory.token_ids.tolist()
        assert np.array_equal(np.float32(row["logprobs"]), trajectory.logprobs)
        assert set(np.asarray(row["weight_versions"])[np.asarray(row["mask"]) == 1]) == {0}


async def test_an_update_and_a_swap_reach_every_replica(run: Run, played: tuple[list[Episode], dict[str, str]]) -> None:
    episodes, group_of = played
    figures = await run.update(batch_of(settle(episodes, group_of).trained, group_of))
    assert figures["max_logprob_diff"] < TOLERANCE
    assert await worst_gap(run, episodes) > 10 * TOLERANCE, "the update changed nothing"
    await run.publish(1)
    members = await run.cluster.replicas("describe")
    assert len(members) == 2 and all(m["version"] == 1 and m["proved"] for m in members)
    again, _ = await run.play_groups(TASKS, 4, sampled=True)
    assert {int(v) for e in again for t in e.trajectories for v in t.weight_versions[t.mask == 1]} == {1}
    assert await worst_gap(run, again) < TOLERANCE


async def test_requests_in_flight_survive_a_swap_with_the_version_of_each_token(run: Run) -> None:
    before = run.state.version
    weights = {before: await snapshot(run)}
    long = [{"question": f"w{i % 12}", "length": 45} for i in range(12)]
    swapped = asyncio.Event()

    async def load() -> list[Episode]:
        played: list[Episode] = []
        while not swapped.is_set():
            played += (await run.play_groups(long, 2, sampled=True))[0]
        return played

    # Two loads, so that one is sampling while the other begins anew.
    loads = [asyncio.create_task(load()), asyncio.create_task(load())]
    beside, group = await run.play_groups(TASKS[:2], 4, sampled=True)
    for version in (before + 1, before + 2, before + 3):
        await run.update(batch_of(settle(beside, group).trained, group))
        async with asyncio.timeout(30):  # between two of its rounds a load samples nothing
            while sum(member["running"] for member in await run.cluster.replicas("status")) < 4:
                await asyncio.sleep(0.01)
        await run.publish(version)
        weights[version] = await snapshot(run)
    swapped.set()
    episodes = [episode for played in await asyncio.gather(*loads) for episode in played]
    assert all(e.rollout.status == "succeeded" for e in episodes)
    rows = [t for e in episodes for t in e.trajectories]
    mixed = [row for row in rows if len(set(row.weight_versions[row.mask == 1])) > 1]
    assert mixed, "no answer was being sampled during a swap"
    for version, model in weights.items():
        for row in rows:
            tokens = (row.weight_versions == version) & (row.mask == 1)
            if tokens.any():
                expected = logprobs_of(model, row.token_ids)
                assert np.abs(row.logprobs - expected)[tokens].max() < TOLERANCE


async def snapshot(run: Run) -> Any:
    """The trainer's model as it now is, through a checkpoint."""
    from transformers import AutoModelForCausalLM

    folder = run.folder.path / f"snapshot-{time.time_ns()}"
    await run.cluster.trainers.save(str(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def logprobs_of(model: Any, token_ids: np.ndarray) -> np.ndarray:
    """log p of each token by plain transformers; 0 for the first."""
    import torch

    ids = torch.tensor(token_ids.astype(np.int64))[None]
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    return np.concatenate([[0.0], scores.gather(1, ids[0, 1:, None])[:, 0].numpy()])


async def test_a_swap_that_moved_nothing_is_refused_by_the_names_of_what_differs(run: Run) -> None:
    episodes, group = await run.play_groups(TASKS, 4, sampled=True)
    await run.update(batch_of(settle(episodes, group).trained, group))
    swapper: Any = run.policy.swapper
    send = swapper.transfer.send

    async def send_nothing(version: int, members: Any, only: Any = None) -> Any:
        canaries = canaries_of(members)
        expected = [[float(x) for x in row] for row in await run.cluster.trainers.logprobs(canaries)]
        return await run.cluster.replicas("prove", version, canaries, expected, TOLERANCE)

    async def no_restart(replica_ids: Any) -> None:
        pass

    restart, swapper._restart, swapper.transfer.send = swapper._restart, no_restart, send_nothing
    with pytest.raises(SwapError) as refused:
        await run.publish(run.state.version)
    swapper._restart, swapper.transfer.send = restart, send
    assert "lm_head.weight (tied to model.embed_tokens.weight)" in str(refused.value)
    assert "model.layers.*.mlp.down_proj.weight (2)" in str(refused.value)
    assert "model.layers.*.input_layernorm.weight (2)" in str(refused.value)
    await run.publish(run.state.version + 1)


async def test_the_folder_tells_where_the_store_is(run: Run) -> None:
    told = json.loads((run.folder.path / "ray.json").read_text())
    store = StoreClient(ray.get_actor(told["store"], told["namespace"]))
    assert told["shards"] == 1 and (await store.statistics())["total_rollouts"] > 0


async def test_an_attempts_key_opens_its_own_route_alone(run: Run) -> None:
    resources = await run.store.get_resources_by_id("sampled")
    assert resources is not None
    root = resources.resources["main_llm"].endpoint.removesuffix("/v1")  # type: ignore[union-attr]
    good = issue_key(run.cluster.secret, Claims("ro-1", "at-1", time.time() + 60))
    stale = issue_key(run.cluster.secret, Claims("ro-1", "at-1", time.time() - 1))
    cases = [(good, "at-2", "belongs to attempt"), (stale, "at-1", "expired"), ("sk-guess", "at-1", "not a lightning")]
    for key, attempt, reason in cases:
        client = openai.AsyncOpenAI(base_url=f"{root}/rollout/ro-1/attempt/{attempt}/v1", api_key=key)
        with pytest.raises(openai.AuthenticationError, match=reason):
            await client.models.list()
    client = openai.AsyncOpenAI(base_url=f"{root}/rollout/ro-1/attempt/at-1/v1", api_key=good)
    assert [model.id async for model in client.models.list()] == ["policy"]
    bare = openai.AsyncOpenAI(base_url=f"{root}/v1", api_key=good)
    assert [model.id async for model in bare.models.list()] == ["policy"], "the key alone tells whose call it is"
