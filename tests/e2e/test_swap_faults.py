"""Swaps that go wrong on the way: each ends proved, or stopped with a named error; never silent, never hanging.

Faults are put into the real actors: what trainer rank 0 exports, how long it takes, who is killed when. Weights travel
in chunks, small as the model is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.errors import TrainersLostError
from lightning_ray.policy import transfer
from lightning_ray.run.events import read_events
from lightning_ray.run.run import Run
from tests.e2e.started import started
from tests.e2e.tiny import make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
TASKS = [{"question": "w1 w2", "length": 6}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    engine = EngineSettings(replicas=2, max_model_len=128, kv_cache_memory_mb=16)
    settings = GRPO(model=make_tiny_model, ranks=1, engine=engine)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 40_000)
        async with started(tmp_path_factory.mktemp("runs") / "faults", settings, TASKS, runners) as run:
            yield run


async def at_rank_0(run: Run, change: Callable[[Any], None]) -> None:
    await run.cluster.trainers.ranks[0].__ray_call__.remote(change)


def spoiling(times: int, spoil: Callable[[list[Any], list[Any], int], None], part: str) -> Callable[[Any], None]:
    """Spoils the first tensor of that name in what the next ``times`` exports hand out."""

    def change(rank: Any) -> None:
        export, left = rank.publisher.export, [times]

        def spoiled(*chunk: int) -> Any:
            import ray

            offer = export(*chunk)
            layout = list(offer["layout"])
            places = [place for place, (name, _, _) in enumerate(layout) if f"layers.1.{part}" in name]
            if left[0] > 0 and places:
                left[0] -= 1
                parts = [each.copy() for each in ray.get(offer["weights"][0])]
                spoil(parts, layout, places[0])
                offer = {**offer, "weights": [ray.put(parts)], "layout": layout}
            return offer

        rank.publisher.export = spoiled

    return change


def flip(parts: list[Any], layout: list[Any], index: int) -> None:
    values = parts[index].view("float32")
    values *= -1


def drop(parts: list[Any], layout: list[Any], index: int) -> None:
    del parts[index], layout[index]


async def still_works(run: Run) -> None:
    """Every replica proved the version, and a rollout trains under it."""
    members = await run.cluster.replicas("describe")
    assert len(members) == 2 and all(m["proved"] and m["version"] == run.state.version for m in members)
    episodes, _ = await run.play_groups(TASKS, 2, sampled=True)
    versions = {int(v) for e in episodes for t in e.trajectories for v in t.weight_versions[t.mask == 1]}
    assert versions == {run.state.version}


async def test_weights_travel_in_chunks(run: Run) -> None:
    chunks = []

    def count(rank: Any) -> None:
        export = rank.publisher.export

        def counted(*chunk: int) -> Any:
            offer = export(*chunk)
            rank.seen = [*getattr(rank, "seen", ()), (*chunk[:2], len(offer["layout"]))]
            return offer

        rank.publisher.export = counted

    await at_rank_0(run, other_weights)
    await at_rank_0(run, count)
    await run.publish(run.state.version + 1)
    chunks = await run.cluster.trainers.ranks[0].__ray_call__.remote(lambda rank: rank.seen)
    assert [chunk[0] for chunk in chunks] == list(range(chunks[0][1])) and chunks[0][1] > 2
    assert sum(tensors > 0 for _, _, tensors in chunks) > 2
    swap = run.policy.swapper.last
    assert swap is not None and not swap.mended
    await still_works(run)


@pytest.mark.parametrize(("spoil", "part"), [(flip, "mlp.down_proj"), (drop, "self_attn.q_proj")])
async def test_weights_that_were_spoiled_once_are_sent_again(run: Run, spoil: Any, part: str) -> None:
    # Other weights, so that what is missing shows.
    await at_rank_0(run, other_weights)
    await at_rank_0(run, spoiling(1, spoil, part))
    await run.publish(run.state.version + 1)
    swap = run.policy.swapper.last
    assert swap is not None and len(swap.mended) == 1 and "got the weights again" in swap.mended[0]
    await still_works(run)


def other_weights(rank: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in rank.updater._engine.module.parameters():
            parameter.mul_(1.01)


async def test_weights_that_broke_off_after_some_chunks_are_sent_again(run: Run) -> None:
    def breaks_off(rank: Any) -> None:
        export = rank.publisher.export

        def fails(chunk: int, *rest: int) -> Any:
            if chunk == 2:
                rank.publisher.export = export
                raise OSError("the cable is out")
            return export(chunk, *rest)

        rank.publisher.export = fails

    await at_rank_0(run, other_weights)
    await at_rank_0(run, breaks_off)
    await run.publish(run.state.version + 1)
    swap = run.policy.swapper.last
    assert swap is not None and len(swap.mended) == 1 and "sent again" in swap.mended[0]
    assert "the cable is out" in swap.mended[0]
    await still_works(run)


async def test_a_replica_that_dies_in_the_middle_does_not_stop_the_swap(run: Run) -> None:
    def slow(rank: Any) -> None:
        logprobs = rank.updater.logprobs

        def later(sequences: Any) -> Any:
            time.sleep(2.0)
            rank.updater.logprobs = logprobs
            return logprobs(sequences)

        rank.updater.logprobs = later

    await at_rank_0(run, slow)
    victim = (await run.cluster.replicas("describe"))[0]
    publishing = asyncio.create_task(run.publish(run.state.version + 1))
    await asyncio.sleep(1.0)  # its weights are loaded, the proof waits for the trainer's logprobs
    os.kill(victim["pid"], signal.SIGKILL)
    await asyncio.wait_for(publishing, 120)
    deadline = time.monotonic() + 120
    while True:
        members = await run.cluster.replicas("describe")
        if len(members) == 2 and all(m["proved"] for m in members):
            break
        assert time.monotonic() < deadline, members
        await asyncio.sleep(0.5)
    assert victim["replica_id"] not in {m["replica_id"] for m in members}
    death = await told_death(run, "policy replica", victim["pid"])
    assert "SIGKILL" in death["cause"] or "without a word" in death["cause"]
    assert death["lost"] == "no rollout" and death["next"].startswith("Serve starts another")
    await still_works(run)


async def told_death(run: Run, role: str, pid: int) -> dict[str, Any]:
    """What a person was told of it, once."""
    async with asyncio.timeout(30):
        while not (told := [e for e in read_events(run.folder.path) if e.get("role") == role and e["pid"] == pid]):
            await asyncio.sleep(0.5)
    [death] = told
    return death


async def test_replicas_that_cannot_be_mended_are_restarted(run: Run) -> None:
    await at_rank_0(run, other_weights)
    before = {m["replica_id"] for m in await run.cluster.replicas("describe")}
    await at_rank_0(run, spoiling(2, flip, "mlp.down_proj"))
    await asyncio.wait_for(run.publish(run.state.version + 1), 240)
    swap = run.policy.swapper.last
    assert swap is not None and "was restarted" in swap.mended[-1]
    assert not before & {m["replica_id"] for m in await run.cluster.replicas("describe")}
    await still_works(run)


async def test_a_rank_that_dies_in_the_push_is_named(run: Run) -> None:
    def dies(rank: Any) -> None:
        rank.publisher.export = lambda *chunk: os.kill(os.getpid(), signal.SIGKILL)

    pid = await run.cluster.trainers.ranks[0].pid.remote()
    await at_rank_0(run, dies)
    with pytest.raises(
        TrainersLostError, match=r"trainer rank 0 died during '(export|logprobs)' .*: .*Lost: the steps since"
    ):
        await asyncio.wait_for(run.publish(run.state.version + 1), 60)
    assert (await told_death(run, "trainer rank", pid))["lost"] == "the steps since the last checkpoint"
    await run.restart_trainers("it was killed")
    await still_works(run)
