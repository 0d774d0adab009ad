"""One point of the scale benchmark: so many rollouts at once, on so many shards and nodes, measured in a steady state.

    driver (this process): GroupFlow + GroupPlayer + RunRollouts, as a run has them
        enqueue 16 groups of 8 -> wait for each group -> read 16 groups back -> episodes
    runners: real, with ``concurrency`` slots in all; the queue is never empty, so that every slot is taken
    store: real, one or more shards; every end synced before it counts

A window begins and ends right after the driver has read a step's rollouts, so that what is counted is whole. CPU is
what the system counts for a process (user and system) between the two, memory is taken at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray

import lightning_ray as lr
from actors.runner_pool import RunnerPool
from actors.span_store import start_shards
from benchmarks.scale_agent import TURNS, SimulatedAgent, Tasks
from lightning_ray.algorithms.flow import Group, GroupFlow
from lightning_ray.algorithms.group_player import GroupPlayer
from lightning_ray.cluster import LEASE_SECONDS
from lightning_ray.config import RunnerSettings
from lightning_ray.run.rollouts import RunRollouts
from lightning_ray.store import ShardedStore, Store, StoreClient
from lightning_ray.types import EnqueueRolloutRequest, RolloutMode

ENDPOINT = lr.ProxyLLM(endpoint="http://127.0.0.1:1/v1", model="policy", sampling_parameters={"temperature": 1.0})
GROUP, GROUPS_A_STEP = 8, 16
SLOTS_OVER = 2.0
"""Rollouts between queueing and reading, over those that can be played at once: the queue is never empty."""
ROLLOUT_SECONDS = 3600.0
PATIENCE_SECONDS = 300.0
STOP_SECONDS = 20.0
FULL_SHARE = 0.98
"""Of the slots taken, from when the state is steady."""

Figures = dict[str, Any]
Processes = dict[str, list[psutil.Process]]


class Point(NamedTuple):
    """What is measured."""

    concurrency: int
    shards: int = 1
    nodes: int = 1
    line: bool = True
    """Whether the store is on the machine of its clients, so that these may go past Ray."""

    @property
    def runners(self) -> int:
        """Processes."""
        return max(2, self.nodes)

    def __str__(self) -> str:
        parts = [f"{self.concurrency:,} at once"]
        parts += [f"{self.shards} shards"] * (self.shards > 1) + [f"{self.nodes} nodes"] * (self.nodes > 1)
        return ", ".join([*parts, *["through Ray"] * (not self.line)])


class Window(NamedTuple):
    """How long is measured, in seconds, and for how long before that."""

    settle: float
    seconds: float


class Driver:
    """What a run does about rollouts, and no more: what it asks of ``Run`` is here."""

    def __init__(self, store: Store, failure: asyncio.Future[None], concurrency: int) -> None:
        self.store = store
        self._rollouts = RunRollouts(store, failure, ROLLOUT_SECONDS, max_attempts=3)
        slots = round(SLOTS_OVER * concurrency / GROUP / GROUPS_A_STEP) * GROUPS_A_STEP
        tasks = Tasks(under_way=concurrency // GROUP)
        player = GroupPlayer(self, tasks, GROUP)  # type: ignore[arg-type]
        staleness = slots // GROUPS_A_STEP - 1  # never reached: nothing is trained
        self._flow = GroupFlow(player, GROUPS_A_STEP, staleness, 0, last=10**9)
        self.read = 0
        """Rollouts read back."""

    def request(
        self, task: Any, mode: RolloutMode, resources_id: str, metadata: dict[str, Any]
    ) -> EnqueueRolloutRequest:
        """See ``Run.request``."""
        return self._rollouts.request(task, mode, resources_id, {**metadata, "weight_version": 0})

    async def wait_for(self, rollout_ids: Sequence[str]) -> None:
        """See ``Run.wait_for``."""
        await self._rollouts.wait_for(rollout_ids)

    async def step(self) -> None:
        """What a step does with rollouts. Raises RuntimeError if one did not come back as it was played."""
        await self._flow.fill(0)
        groups: list[Group] = await self._flow.take(GROUPS_A_STEP, 0)
        ended = await self._rollouts.read([rollout_id for group in groups for rollout_id in group.rollout_ids])
        ended.agents()
        for episode in ended.episodes():
            seen = episode.rollout.status, episode.reward, episode.calls, len(episode.trajectories)
            if seen != ("succeeded", 1.0, TURNS, 1):
                raise RuntimeError(f"rollout {episode.rollout_id} came back as {seen}")
        self._flow.release(group.group_id for group in groups)
        self.read += GROUP * len(groups)

    async def stop(self) -> None:
        """As a run ends: what is on its way is cancelled."""
        await self._flow.stop()


class Stage(NamedTuple):
    """What is measured: the processes, and the store as the driver sees it."""

    store: Store
    shards: list[Any]
    pool: RunnerPool

    async def processes(self) -> Processes:
        """By part."""
        stores = await asyncio.gather(*(shard.process_id.remote() for shard in self.shards))
        runners = [runner["pid"] for runner in self.pool.status()]
        return {
            "driver": [psutil.Process()],
            "store": [psutil.Process(pid) for pid in stores],
            "runners": [psutil.Process(pid) for pid in runners],
        }


@contextlib.asynccontextmanager
async def stage(folder: Path, point: Point) -> AsyncIterator[Stage]:
    """A store and runners that are all up, on the Ray that is there."""
    name = f"scale-{time.monotonic_ns()}"
    shards = await asyncio.to_thread(start_shards, folder / name, name, point.shards, lease_seconds=LEASE_SECONDS)
    clients = [StoreClient(shard, line=point.line) for shard in shards]
    store = clients[0] if point.shards == 1 else ShardedStore(clients)
    await store.update_resources("sampled", {"main_llm": ENDPOINT})
    slots = -(-point.concurrency // point.runners)
    settings = RunnerSettings(minimum=point.runners, maximum=point.runners, concurrency=slots)
    pool = RunnerPool(name, SimulatedAgent(store), store, b"s" * 32, settings)
    pool.start()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len([runner for runner in pool.status() if runner["pid"]]) < point.runners:
                await asyncio.sleep(0.05)
        yield Stage(store, shards, pool)
    finally:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(pool.stop(), STOP_SECONDS)
        for shard in shards:
            ray.kill(shard)


async def measure(folder: Path, point: Point, window: Window, told: Callable[[str], None]) -> Figures:
    """The figures of one point; ``told`` what is going on, about once a second."""
    async with stage(folder, point) as staged:
        driver = Driver(staged.store, staged.pool.failure, point.concurrency)
        watch = Watch(staged.store, lambda live: told(f"{live:,} playing, {driver.read:,} read"))
        watching = asyncio.create_task(watch.run())
        try:
            began = time.monotonic()
            while watch.live < FULL_SHARE * point.concurrency:
                if time.monotonic() - began > PATIENCE_SECONDS:
                    raise RuntimeError(f"after {PATIENCE_SECONDS:.0f} s {watch.live} of {point} are played")
                await driver.step()
            filled = time.monotonic()
            while time.monotonic() < filled + window.settle:
                await driver.step()
            processes = await staged.processes()
            return {
                **point._asdict(),
                "fill_seconds": round(filled - began, 1),
                **await _window(driver, watch, processes, window.seconds),
                **memory(processes),
            }
        finally:
            watching.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(driver.stop(), STOP_SECONDS)


class Watch:
    """Looks at the store once a second: how many attempts are live, and whether one was lost."""

    def __init__(self, store: Store, told: Callable[[int], None]) -> None:
        self._store, self._told = store, told
        self.live = 0
        self.seen: list[int] = []
        self.statistics: dict[str, Any] = {}

    async def run(self) -> None:
        while True:
            self.statistics = await self._store.statistics()
            self.live = self.statistics["live_attempts"]
            self.seen.append(self.live)
            self._told(self.live)
            await asyncio.sleep(1.0)


async def _window(driver: Driver, watch: Watch, processes: Processes, seconds: float) -> Figures:
    watch.seen.clear()
    read, began, before = driver.read, time.monotonic(), cpu_seconds(processes)
    while time.monotonic() < began + seconds:
        await driver.step()
    lasted, rollouts, after = time.monotonic() - began, driver.read - read, cpu_seconds(processes)
    spent = {part: after[part] - before[part] for part in after}
    statistics = watch.statistics
    return {
        "rollouts_per_s": round(rollouts / lasted, 1),
        "window_seconds": round(lasted, 1),
        "peak_concurrent": max(watch.seen, default=0),
        "least_concurrent": min(watch.seen, default=0),
        **{f"{part}_cpu_ms_per_rollout": round(value / rollouts * 1e3, 3) for part, value in spent.items()},
        **{f"{part}_cores": round(value / lasted, 3) for part, value in spent.items()},
        "attempts_lost": statistics["total_attempts"]
        - statistics["live_attempts"]
        - statistics["rollouts_by_status"].get("succeeded", 0),
        "store_spans": statistics["total_spans"],
        "disk_bytes": statistics["disk_bytes"],
    }


def cpu_seconds(processes: Processes) -> dict[str, float]:
    """User and system time of each part so far; of Ray's own processes, and of the store's compactions that ended."""
    times = {part: [process.cpu_times() for process in group] for part, group in processes.items()}
    spent = {part: sum(each.user + each.system for each in group) for part, group in times.items()}
    spent["compaction"] = sum(each.children_user + each.children_system for each in times["store"])
    known = {process.pid for group in processes.values() for process in group}
    spent |= {"gcs": 0.0, "raylets": 0.0}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            part = {"gcs_server": "gcs", "raylet": "raylets"}.get(process.name())
            if part and process.pid not in known:
                spent[part] += sum(process.cpu_times()[:2])
    return spent


def memory(processes: Processes) -> Figures:
    """MB of each part: its share (PSS), and all that is mapped (RSS)."""
    figures: Figures = {}
    for part, group in processes.items():
        full = [process.memory_full_info() for process in group]
        figures[f"{part}_pss_mb"] = round(sum(each.pss for each in full) / 1e6, 1)
        figures[f"{part}_rss_mb"] = round(sum(each.rss for each in full) / 1e6, 1)
    return figures
