"""The pool of runners on a real Ray: deaths, their reasons, growing, draining, and chaos."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from benchmarks.rollout_chaos import chaos
from lightning_ray.config import RunnerSettings
from lightning_ray.errors import InfrastructureError
from lightning_ray.own_ray import OwnRay
from lightning_ray.store import Store, StoreClient
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import RolloutConfig
from tests.runner_agents import async_agent, dies_when_loaded, sleeper

ENDPOINT = lr.ProxyLLM(endpoint="http://host:1/v1", model="policy")
LEASE_SECONDS = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    own = OwnRay.start(lambda _: {}, {"num_cpus": 4, "log_to_driver": False, "logging_level": "ERROR"})
    yield ray
    own.end()


@pytest.fixture
async def store(cluster: Any, tmp_path: Path) -> AsyncIterator[Store]:
    from actors.span_store import start

    actor = start(tmp_path, f"store-{tmp_path.name}", lease_seconds=LEASE_SECONDS)
    client = StoreClient(actor)
    await client.update_resources("sampled", {"main_llm": ENDPOINT})
    yield client
    cluster.kill(actor)


@contextlib.asynccontextmanager
async def pool_of(store: Store, agent: Any, **settings: Any) -> AsyncIterator[Any]:
    from actors.runner_pool import RunnerPool

    pool = RunnerPool("pool", agent, store, b"s" * 32, RunnerSettings(**settings))
    pool.start()
    try:
        yield pool
    finally:
        async with asyncio.timeout(20):
            await pool.stop()


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)


async def until_playing(store: Store, count: int) -> None:
    deadline = time.monotonic() + 30.0
    while (await store.statistics())["live_attempts"] < count:
        assert time.monotonic() < deadline, "they are not played"
        await asyncio.sleep(0.02)


def pids(pool: Any) -> list[int]:
    return [runner["pid"] for runner in pool.status() if runner["pid"] is not None]


async def test_a_killed_runners_rollouts_run_again_before_their_leases_end_and_say_why(store: Store) -> None:
    queued = await store.enqueue_many_rollouts([Request(input={"seconds": 3.0}) for _ in range(8)])
    ids = [rollout.rollout_id for rollout in queued]
    async with pool_of(store, sleeper, minimum=1, maximum=1, concurrency=8) as pool:
        await until_playing(store, 8)
        [victim] = pids(pool)
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
        assert [rollout.status for rollout in ended] == ["succeeded"] * 8
        for rollout_id in ids:
            first, second = (await store.query_attempts(rollout_id)).items
            assert first.metadata is not None and first.metadata["infrastructure"] is True
            assert "SIGKILL" in first.metadata["reason"] and str(victim) in first.metadata["reason"]
            assert second.worker_id != first.worker_id and second.start_time - killed < LEASE_SECONDS / 2
        assert pids(pool) != [victim]


@lr.rollout
def tells_its_python(task: Any, llm: lr.LLM) -> None:
    """Says which environment it runs in."""
    import sys

    lr.emit_object({"prefix": sys.prefix})


async def test_another_environments_python_plays_the_agent(store: Store, other_python: str) -> None:
    [rollout] = await store.enqueue_many_rollouts([Request(input={})])
    settings = {"minimum": 1, "maximum": 1, "concurrency": 1, "python": other_python}
    async with pool_of(store, tells_its_python, **settings):
        [ended] = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)
    assert ended.status == "succeeded", ended.metadata
    spans = await store.query_spans(rollout.rollout_id, "latest", name="agentlightning.object")
    [told] = [json.loads(span.attributes["agentlightning.object.json"]) for span in spans]
    assert told["prefix"] == str(Path(other_python).parent.parent)


async def test_a_runner_that_crashes_leaves_its_last_words(store: Store) -> None:
    [rollout] = await store.enqueue_many_rollouts([Request(input={"do": "crash", "how": "segfault"})])
    async with pool_of(store, async_agent):
        [ended] = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)
        first = (await store.query_attempts(rollout.rollout_id)).items[0]
        assert ended.status == "succeeded" and first.metadata is not None
        assert "Segmentation fault" in first.metadata["reason"] and "runner_agents.py" in first.metadata["reason"]


async def test_runners_that_die_again_and_again_fail_with_the_reason(store: Store) -> None:
    async with pool_of(store, dies_when_loaded, minimum=2, maximum=2) as pool:
        words = r"died 5 times in a row.*loaded on a runner: ImportError: no module of mine"
        with pytest.raises(InfrastructureError, match=words):
            await asyncio.wait_for(pool.failure, 60)


async def test_the_pool_grows_with_the_queue_and_drains_before_it_shrinks(store: Store) -> None:
    async with pool_of(store, sleeper, minimum=1, maximum=3, concurrency=4) as pool:
        pool._sizing._shrink_seconds = 1.0
        queued = await store.enqueue_many_rollouts([Request(input={"seconds": 2.0}) for _ in range(40)])
        await until(lambda: len(pids(pool)) == 3)
        ids = [rollout.rollout_id for rollout in queued]
        ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
        assert len(ended) == 40
        await until(lambda: len(pool.status()) == 1)
        for rollout_id in ids:
            assert len(await store.query_attempts(rollout_id)) == 1


async def test_an_agent_that_blocks_the_event_loop_costs_its_runner(store: Store) -> None:
    config = RolloutConfig(timeout_seconds=2.0)
    blocking = await store.enqueue_rollout({"do": "spin", "wait": 0.5}, config=config)
    beside = await store.enqueue_rollout({"wait": 1.0})
    async with pool_of(store, async_agent):
        ended = await store.wait_for_rollouts(rollout_ids=[blocking.rollout_id, beside.rollout_id], timeout=60)
        assert [rollout.status for rollout in ended] == ["failed", "succeeded"]
        assert ended[0].metadata is not None and ended[0].metadata["failure"]["kind"] == "timeout"
        first, second = (await store.query_attempts(beside.rollout_id)).items
        assert first.metadata is not None and "the event loop was blocked" in first.metadata["reason"]
        assert first.worker_id != second.worker_id


async def test_processes_of_their_own_crash_without_their_runner(store: Store) -> None:
    tasks: list[dict[str, Any]] = [{"do": "crash"}, *({} for _ in range(10))]
    queued = await store.enqueue_many_rollouts([Request(input=task) for task in tasks])
    async with pool_of(store, async_agent, concurrency=2, isolation="process") as pool:
        await until(lambda: pids(pool))
        before = pids(pool)
        ended = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in queued], timeout=60)
        assert {rollout.status for rollout in ended} == {"succeeded"} and pids(pool) == before
        first = (await store.query_attempts(queued[0].rollout_id)).items[0]
        assert first.metadata is not None and "SIGKILL" in first.metadata["reason"]


async def test_every_rollout_ends_once_while_runners_are_killed_at_random(store: Store) -> None:
    async with pool_of(store, sleeper, minimum=3, maximum=3, concurrency=8) as pool:
        await until(lambda: len(pids(pool)) == 3)
        figures = await chaos(pool, store, kills=10, seconds_between=0.7)
    assert (figures["lost"], figures["duplicated"]) == (0, 0) and figures["chaos_rollouts"] > 200, figures
