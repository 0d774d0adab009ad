"""The figures of the capture benchmark: windows with and without capture in turn, medians of their differences."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import ray
from rich.progress import Progress

from benchmarks import capture_serve as serve
from benchmarks.capture_client import Client, Window, request_of
from benchmarks.capture_drift import drift
from benchmarks.capture_model import LONGEST, make_model
from benchmarks.capture_replica import Replica
from benchmarks.capture_stub import SAMPLED, logprob_of
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings
from lightning_ray.serving import CPU_ENGINE, QUIET
from lightning_ray.store import Store

NAME = "policy"
PROMPT, HELD_PROMPT = 600, 60
ATTEMPTS = 32
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
SETTINGS = EngineSettings(max_model_len=LONGEST, max_num_seqs=32, kv_cache_memory_mb=64)

UNTRAINED = -1
"""The version of a replica before the first push."""

Figures = dict[str, Any]


class Scale(NamedTuple):
    """How much is measured: pairs of windows, calls in a window one at a time and 32 at once, calls held, chats."""

    pairs: int
    calls_c1: int
    calls_c32: int
    held: int
    chats: int


FULL = Scale(pairs=9, calls_c1=150, calls_c32=480, held=1500, chats=24)
QUICK = Scale(pairs=5, calls_c1=100, calls_c32=320, held=1500, chats=12)


@dataclass
class Place:
    """What is up: the cluster, the replica with and without capture, a client, and keys of attempts."""

    cluster: Cluster
    store: Store
    replica: Any
    client: Any
    bare: str
    captured: str
    keys: list[tuple[str, str]]
    """Rollout id and key."""
    store_process: psutil.Process
    prompts: list[list[dict[str, str]]] = field(default_factory=list)

    def requests(self, base: str, **more: Any) -> list[bytes]:
        """Chat requests of each attempt in turn."""
        return [
            request_of(
                f"{base}/v1/chat/completions",
                self.keys[index % len(self.keys)][1],
                json.dumps({"model": NAME, "messages": messages, "max_tokens": SAMPLED, **more}).encode(),
            )
            for index, messages in enumerate(self.prompts)
        ]


async def measure(cluster: Cluster, folder: Path, scale: Scale, progress: Progress) -> Figures:
    """All figures, one after the other."""
    place = await _place(cluster, folder, progress)
    figures: Figures = {}
    figures |= await one_at_a_time(place, scale, progress)
    figures |= await streamed(place, scale, progress)
    figures |= await many_at_once(place, scale, progress)
    figures |= await held(place, scale, progress)
    await place.replica.sample.remote(True)
    figures |= await drift(
        place.replica, place.client, place.store, place.captured, cluster.secret, scale.chats, progress
    )
    return figures | await through_serve(place, folder, scale, progress)


async def _place(cluster: Cluster, folder: Path, progress: Progress) -> Place:
    bar = progress.add_task("Ray, store, model and engine", total=None)
    make_model(folder / "model")
    cluster.start_ray()
    store = cluster.start_store(folder / "store")
    environment = {"env_vars": QUIET | CPU_ENGINE}
    replica = ray.remote(Replica).options(runtime_env=environment, max_concurrency=1000).remote(store, cluster.secret)
    client = ray.remote(Client).remote()
    bare, captured = await replica.start.remote(str(folder / "model"), NAME, SETTINGS)
    keys = [await new_key(store, cluster.secret) for _ in range(ATTEMPTS)]
    process = psutil.Process(await cluster._store_actors[0].process_id.remote())
    place = Place(
        cluster, store, replica, client, f"http://127.0.0.1:{bare}", f"http://127.0.0.1:{captured}", keys, process
    )
    place.prompts = await replica.prompts.remote(2 * ATTEMPTS, PROMPT)
    progress.update(bar, total=1, completed=1)
    return place


async def new_key(store: Store, secret: bytes) -> tuple[str, str]:
    """A rollout's id and the key of its attempt."""
    started = await store.start_rollout({"question": "?"}, mode="train")
    claims = Claims(started.rollout_id, started.attempt.attempt_id, time.time() + 3600, SAMPLING)
    return started.rollout_id, issue_key(secret, claims)


class Pair(NamedTuple):
    """A window without capture and one with, and CPU seconds a call of the replica and the store in each."""

    off: Window
    on: Window
    cpu: tuple[float, float]
    store_cpu: tuple[float, float]

    def added_ms(self, what: str) -> float:
        """Of the windows' medians."""
        return 1e3 * (median(getattr(self.on, what)) - median(getattr(self.off, what)))


async def pairs(
    place: Place, scale: Scale, count: int, at_once: int, progress: Progress, name: str, **more: Any
) -> list[Pair]:
    """Windows in turn, the order changing; a first pair warms up and does not count."""
    bar = progress.add_task(name, total=scale.pairs + 1)
    requests = [place.requests(place.bare, **more), place.requests(place.captured, **more)]
    found = []
    for number in range(scale.pairs + 1):
        windows: dict[int, tuple[Window, float, float]] = {}
        for side in (0, 1) if number % 2 else (1, 0):
            windows[side] = await _window(place, requests[side], at_once, count)
        (off, cpu_off, store_off), (on, cpu_on, store_on) = windows[0], windows[1]
        found.append(Pair(off, on, (cpu_off, cpu_on), (store_off, store_on)))
        progress.advance(bar)
    return found[1:]


async def _window(place: Place, requests: Sequence[bytes], at_once: int, count: int) -> tuple[Window, float, float]:
    before, store_before = await place.replica.cpu.remote(), _cpu(place.store_process)
    window = await place.client.calls.remote(requests, at_once, count)
    cpu, store_cpu = await place.replica.cpu.remote() - before, _cpu(place.store_process) - store_before
    return window, 1e3 * cpu / count, 1e3 * store_cpu / count


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def one_at_a_time(place: Place, scale: Scale, progress: Progress) -> Figures:
    """One client."""
    found = await pairs(place, scale, scale.calls_c1, 1, progress, "one at a time")
    appends = await place.replica.append_seconds.remote()
    return {
        "added_ms_p50_c1": _middle(pair.added_ms("total") for pair in found),
        "added_cpu_ms_per_call": _middle(pair.cpu[1] - pair.cpu[0] for pair in found),
        "store_cpu_ms_per_call": _middle(pair.store_cpu[1] - pair.store_cpu[0] for pair in found),
        "uncaptured_ms_p50_c1": _middle(1e3 * median(pair.off.total) for pair in found),
        "uncaptured_cpu_ms_per_call": _middle(pair.cpu[0] for pair in found),
        "append_ms_p50_c1": round(1e3 * median(appends), 2),
    }


async def streamed(place: Place, scale: Scale, progress: Progress) -> Figures:
    """One client that streams."""
    found = await pairs(place, scale, scale.calls_c1, 1, progress, "streamed", stream=True)
    return {
        "stream_first_byte_added_ms_p50": _middle(pair.added_ms("first_byte") for pair in found),
        "stream_added_ms_p50": _middle(pair.added_ms("total") for pair in found),
        "stream_uncaptured_first_byte_ms_p50": _middle(1e3 * median(pair.off.first_byte) for pair in found),
    }


async def many_at_once(place: Place, scale: Scale, progress: Progress) -> Figures:
    """32 clients."""
    await place.replica.append_seconds.remote()
    found = await pairs(place, scale, scale.calls_c32, 32, progress, "32 at once")
    appends = await place.replica.append_seconds.remote()
    return {
        "added_ms_p50_c32": _middle(pair.added_ms("total") for pair in found),
        "rps_ratio_c32": round(median(pair.off.seconds / pair.on.seconds for pair in found), 3),
        "rps_uncaptured_c32": round(median(scale.calls_c32 / pair.off.seconds for pair in found), 1),
        "uncaptured_ms_p50_c32": _middle(1e3 * median(pair.off.total) for pair in found),
        "added_cpu_ms_per_call_c32": _middle(pair.cpu[1] - pair.cpu[0] for pair in found),
        "store_cpu_ms_per_call_c32": _middle(pair.store_cpu[1] - pair.store_cpu[0] for pair in found),
        "append_ms_p50_c32": round(1e3 * median(appends), 2),
    }


def _middle(values: Any) -> float:
    return round(median(values), 3)


async def held(place: Place, scale: Scale, progress: Progress) -> Figures:
    """Calls of a second, all at once; each must be answered with what was sampled, and be in the store."""
    bar = progress.add_task("calls held", total=None)
    attempts = [await new_key(place.store, place.cluster.secret) for _ in range(ATTEMPTS)]
    mine = Place(**{**vars(place), "keys": attempts})
    prompts = await place.replica.prompts.remote(ATTEMPTS, HELD_PROMPT)
    mine.prompts = [prompts[index % ATTEMPTS] for index in range(scale.held)]
    await place.replica.take.remote(1.0)
    bodies = await place.client.burst.remote(mine.requests(place.captured))
    most = await place.replica.most_in_flight.remote()
    await place.replica.take.remote(0.0)
    ids, text = await place.replica.sampled.remote()
    spans = await place.store.scan_spans([rollout_id for rollout_id, _ in attempts])
    rows = [row for row in spans.to_pylist() if row["prompt_ids"]]
    wrong = sum(json.loads(body)["choices"][0]["message"]["content"] != text for body in bodies)
    logprobs = [logprob_of(index) for index in range(SAMPLED)]
    bad = sum(row["sampled_ids"] != ids or row["logprobs"] != logprobs for row in rows)
    if len(bodies) != scale.held or wrong or len(rows) != scale.held or bad:
        raise RuntimeError(f"of {scale.held} calls {wrong} were answered wrongly, {len(rows)} captured, {bad} wrongly")
    progress.update(bar, total=1, completed=1)
    return {"concurrent_calls_held": most}


async def through_serve(place: Place, folder: Path, scale: Scale, progress: Progress) -> Figures:
    """The whole path, against the bare app under uvicorn, both with an engine of their own."""
    bar = progress.add_task("through Serve", total=scale.pairs + 2)
    served = await place.cluster.start_policy(folder / "model", NAME, SETTINGS)
    await place.cluster.replicas("prove", UNTRAINED, [], [], math.inf)
    progress.advance(bar)
    keys = tuple([(await new_key(place.store, place.cluster.secret))[1] for _ in range(ATTEMPTS)])
    whole, captured, alone = (
        serve.Path(url, keys) for url in (served.endpoint, f"{place.captured}/v1", f"{place.bare}/v1")
    )
    return await serve.serve_path(
        place.client, whole, captured, alone, NAME, scale.pairs, scale.calls_c1, lambda: progress.advance(bar)
    )
