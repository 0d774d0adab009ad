"""Deaths on a real Ray of two nodes: told once, with their cause; what was ended on purpose is not told."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.simulated import simulated_cluster
from lightning_ray.deaths import Death, Process, death_of, here
from lightning_ray.deaths import watch as watch_module
from lightning_ray.deaths.watch import DeathWatch


@ray.remote(num_cpus=0)
class Part:
    def where(self) -> Any:
        print("my last words", file=sys.stderr, flush=True)
        return here()

    def exits(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    folder = tempfile.mkdtemp(prefix="lr-")
    quick = {"health_check_period_ms": 300, "health_check_failure_threshold": 3}
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80_000_000, "temp_dir": folder}
    cluster = simulated_cluster(**head, _system_config=quick)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.other = cluster.add_node(num_cpus=2, resources={"other": 1}, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


async def test_parts_that_ray_starts_again_and_nodes_are_told_once(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "WATCH_SECONDS", 0.2)
    told: list[Death] = []
    watch = DeathWatch(told.append, list, told.append)
    on_head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    store = Part.options(max_restarts=-1, max_task_retries=-1, scheduling_strategy=on_head).remote()
    away = Part.options(resources={"other": 0.1}).remote()
    ended = Part.options(scheduling_strategy=on_head).remote()
    places = [await part.where.remote() for part in (store, away, ended)]
    watch.know(store, "span store", "")
    watch.know(away, "policy replica", "ab12")
    watch.know(ended, "relay", "")
    watch.start()
    await until(lambda: all(known.process.pid for known in watch._known.values()))
    try:
        ray.kill(ended)
        os.kill(places[0]["pid"], signal.SIGKILL)
        await until(lambda: told)
        await store.where.remote()
        cluster.remove_node(cluster.other, allow_graceful=False)
        await until(lambda: len(told) == 3)
        await asyncio.sleep(1.0)
    finally:
        watch.stop()
    first, *others = told
    assert (
        str(first).startswith(f"span store died (process {places[0]['pid']}, node ") and "my last words" in first.cause
    )
    assert "Ray starts it again" in first.next
    by_role = {death.process.role: death for death in others}
    assert "heartbeats" in by_role["node"].cause and by_role["node"].lost == "what ran on it: policy replica ab12"
    assert by_role["policy replica"].process.name == "ab12"
    assert "its node died" in by_role["policy replica"].cause


async def test_a_part_that_exits_is_told_by_its_last_words(cluster: Any) -> None:
    part = Part.remote()
    process = Process.at("runner", "runner-0", await part.where.remote())
    with pytest.raises(ray.exceptions.RayActorError) as error:
        await part.exits.remote()
    death = await asyncio.to_thread(death_of, process, error.value)
    assert "my last words" in death.cause
    assert "exited with code 3" in death.cause or "without a word to Ray" in death.cause
