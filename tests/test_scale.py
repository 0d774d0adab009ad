"""The scale benchmark's simulated agent leaves what a real one does, and its plan is the arithmetic that it says."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scale_agent import TURNS, SimulatedAgent, Tasks
from benchmarks.scale_plan import Costs, Deployment, costs_of, deployment_of, needs
from lightning_ray.errors import ConfigError
from lightning_ray.run.rollouts import read_ended
from lightning_ray.runner import Runner
from lightning_ray.store import LocalStoreClient, SpanStore
from lightning_ray.types import EnqueueRolloutRequest

COSTS = Costs(
    store_ms=1.0,
    store_alone_ms=3.0,
    compaction_ms=2.0,
    driver_ms=0.5,
    runner_ms=2.0,
    raylet_ms=0.1,
    store_kb=20.0,
    driver_kb=10.0,
    runner_kb=40.0,
)


async def test_a_simulated_rollout_is_one_conversation_of_three_calls_and_a_reward(tmp_path: Path) -> None:
    store = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    tasks = Tasks(under_way=5, mean_seconds=0.01).take(0, 10)
    queued = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=task) for task in tasks])
    ids = [rollout.rollout_id for rollout in queued]
    runner = Runner(SimulatedAgent(store), store, "runner", b"s" * 32, concurrency=10)
    running = asyncio.create_task(runner.run())
    await store.wait_for_rollouts(rollout_ids=ids, timeout=20)
    runner.drain("all is played")
    await running
    ended = await read_ended(store, ids)
    await store.close()
    assert ended.spans.num_rows == (TURNS + 1) * len(ids) == len(set(ended.spans["span_id"].to_pylist()))
    for episode in ended.episodes():
        assert (episode.rollout.status, episode.reward, episode.calls) == ("succeeded", 1.0, TURNS)
        [trajectory] = episode.trajectories
        assert (len(trajectory.token_ids), trajectory.prompt_length) == (900 + 150, 300)
        assert episode.sampled_tokens == 150 * TURNS


def test_tasks_under_way_end_as_often_as_later_ones_begin() -> None:
    """In equilibrium, of n tasks of mean length m so many end in a short time t as n * t / m."""
    number, mean = 20_000, 25.0
    tasks = Tasks(number, mean)
    begun = np.array([task["seconds"] for task in tasks.take(0, number)])
    fresh = np.array([task["seconds"] for task in tasks.take(number, number)])
    assert fresh.mean() == pytest.approx(mean, rel=0.05)
    assert np.percentile(fresh, 95) / np.median(fresh) > 4
    assert np.mean(begun < mean / 10) == pytest.approx(0.1, abs=0.015)
    assert tasks.take(7, 2) == [tasks.take(7, 1)[0], tasks.take(8, 1)[0]]


def needed(what: Deployment, costs: Costs = COSTS) -> dict[str, float]:
    return {f"{need.part}: {need.what}": need.value for need in needs(what, costs)}


def test_a_plan_is_linear_in_rollouts_and_in_calls() -> None:
    small = needed(Deployment(rollouts=10_000, seconds=100, calls=3))
    assert small["load: rollouts ended"] == 100
    assert small["load: model calls"] == 300
    assert small["store: CPU, calls sharing appends"] == pytest.approx(0.1)
    assert small["store: CPU, each call by itself"] == pytest.approx(0.3)
    assert small["driver: CPU, of one core"] == pytest.approx(0.05)
    assert small["driver: rollouts at most, at that cost"] == pytest.approx(1200)
    assert small["store: memory for what is played"] == pytest.approx(0.2)
    assert small["runners: rollouts that one core carries at most"] == pytest.approx(30_000)
    large = needed(Deployment(rollouts=100_000, seconds=100, calls=7))
    for name in (
        "store: CPU, each call by itself",
        "store: CPU of compaction",
        "driver: CPU, of one core",
        "ray: CPU of all raylets, for messages",
    ):
        assert large[name] == pytest.approx(20 * small[name])
    assert large["store: shards, each busy 60% of a core at most"] == 10  # 6 cores / 0.6


def test_a_plan_counts_gpus_and_actors_once() -> None:
    what = Deployment(gpus=1000, rollouts=100_000, trainer_share=0.25, gpus_per_replica=2, concurrency=2500)
    plan = needed(what)
    assert plan["serve: replicas"] == 375
    assert plan["ray: nodes with GPUs"] == 125
    assert plan["runners: processes"] == 40
    actors = 40 + 375 + 250 + plan["store: shards, each busy 60% of a core at most"]
    assert plan["ray: actors (runners, shards, replicas, 250 ranks)"] == actors
    assert plan["weights: into all replicas"] == 16 * 375
    slower = needed(replace(what, step_seconds=2 * what.step_seconds))
    name = "weights: into each node, for a tenth of a step"
    assert slower[name] == pytest.approx(plan[name] / 2)


def point(concurrency: int, line: bool = True, **more: Any) -> dict[str, Any]:
    parts = ("store", "compaction", "driver", "runners", "raylets")
    memory = {f"{part}_pss_mb": 100 + concurrency * 0.01 for part in ("store", "driver", "runners")}
    cpu = {f"{part}_cpu_ms_per_rollout": 1.0 if line else 2.0 for part in parts}
    return {"concurrency": concurrency, "shards": 1, "nodes": 1, "line": line, **memory, **cpu, **more}


def test_costs_are_the_most_at_10_000_and_memory_is_what_more_rollouts_took() -> None:
    points = [
        point(1000, store_cpu_ms_per_rollout=4.0),
        point(3000),
        point(10_000),
        point(20_000),
        point(10_000, shards=2, driver_cpu_ms_per_rollout=2.5),
        point(10_000, line=False),
    ]
    costs = costs_of({"points": points})
    assert (costs.store_ms, costs.store_alone_ms, costs.driver_ms, costs.runner_ms) == (2.0, 5.0, 2.5, 2.0)
    assert costs.store_kb == pytest.approx(10.0)
    with pytest.raises(ConfigError, match="of a full"):
        costs_of({"points": points[:4]})


@pytest.mark.parametrize(
    ("pairs", "words"),
    [({"gpu": "8"}, "there is no 'gpu'"), ({"gpus": "many"}, "gpus=1"), ({"seconds": "0"}, "above 0")],
)
def test_what_cannot_be_planned_is_named(pairs: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        deployment_of(pairs)
