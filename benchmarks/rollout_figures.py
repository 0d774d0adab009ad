"""The figures of the rollout benchmark: each function measures some, with a fresh store and pool of runners."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import ray
from openai import AsyncOpenAI
from rich.progress import Progress

import lightning_ray as lr
from actors.runner_pool import RunnerPool
from actors.span_store import start
from benchmarks.rollout_chaos import chaos
from lightning_ray.config import RunnerSettings
from lightning_ray.instrumentation import instrument_openai, uninstrument_openai
from lightning_ray.store import Store, StoreClient
from lightning_ray.store.base import Finish
from lightning_ray.tracing import AttemptTrace, traced
from lightning_ray.types import EnqueueRolloutRequest

ENDPOINT = lr.ProxyLLM(endpoint="http://127.0.0.1:1/v1", model="policy", sampling_parameters={"temperature": 1.0})
RUNNERS = 2
WARM_ROLLOUTS = 64
LOST = 32
"""Rollouts that are played by a runner when it is killed."""
PATIENCE_SECONDS = 120.0
CHAOS_PAUSE_SECONDS = 1.0

Figures = dict[str, Any]


class Scale(NamedTuple):
    """How much is measured."""

    rollouts: int
    process_rollouts: int
    windows: int
    calls: int
    recoveries: int
    kills: int


FULL = Scale(rollouts=4000, process_rollouts=600, windows=3, calls=300, recoveries=5, kills=200)
QUICK = Scale(rollouts=2000, process_rollouts=300, windows=3, calls=150, recoveries=3, kills=20)


@lr.rollout
async def trivial(task: Any, llm: lr.LLM) -> float:
    """Returns a reward."""
    return 1.0


@lr.rollout
async def sleeper(task: dict[str, Any], llm: lr.LLM) -> float:
    """Takes as long as the task says."""
    await asyncio.sleep(task["seconds"])
    return 1.0


async def measure(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """All figures, one after the other."""
    figures: Figures = {}
    figures |= await tracing(scale, progress)
    figures |= await trivial_rollouts(folder, scale, progress)
    figures |= await process_rollouts(folder, scale, progress)
    figures |= await recovery(folder, scale, progress)
    return figures | await random_kills(folder, scale, progress)


@contextlib.asynccontextmanager
async def playing(
    folder: Path, name: str, agent: Any, runners: int, **settings: Any
) -> AsyncIterator[tuple[Store, RunnerPool]]:
    """A store and a pool of runners that are all up."""
    actor = start(folder / name, name, lease_seconds=30.0)
    store = StoreClient(actor)
    await store.update_resources("policy", {"main_llm": ENDPOINT})
    pool = RunnerPool(name, agent, store, b"s" * 32, RunnerSettings(minimum=runners, maximum=runners, **settings))
    pool.start()
    try:
        while len([runner for runner in pool.status() if runner["pid"]]) < runners:
            await asyncio.sleep(0.05)
        yield store, pool
    finally:
        await pool.stop()
        ray.kill(actor)


async def play(store: Store, count: int) -> float:
    """Seconds from the queueing of ``count`` rollouts to the end of the last."""
    requests = [EnqueueRolloutRequest(input={"number": number}) for number in range(count)]
    began = time.perf_counter()
    queued = await store.enqueue_many_rollouts(requests)
    ids = [rollout.rollout_id for rollout in queued]
    ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=PATIENCE_SECONDS)
    seconds = time.perf_counter() - began
    bad = [rollout for rollout in ended if rollout.status != "succeeded"]
    if len(ended) < count or bad:
        raise RuntimeError(f"{count - len(ended)} of {count} rollouts did not end, {len(bad)} failed: {bad[:1]}")
    return seconds


async def trivial_rollouts(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """Async agents that return a reward."""
    bar = progress.add_task("trivial rollouts", total=scale.windows)
    rates = []
    async with playing(folder, "trivial", trivial, RUNNERS, concurrency=64) as (store, _):
        await play(store, WARM_ROLLOUTS * RUNNERS)
        for _ in range(scale.windows):
            rates.append(scale.rollouts / await play(store, scale.rollouts))
            progress.advance(bar)
    return {"rollouts_per_s_trivial": round(median(rates), 1)}


async def process_rollouts(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """The same in processes of their own."""
    bar = progress.add_task("rollouts in processes", total=scale.windows)
    rates = []
    async with playing(folder, "process", trivial, RUNNERS, concurrency=2, isolation="process") as (store, _):
        await play(store, WARM_ROLLOUTS)
        for _ in range(scale.windows):
            rates.append(scale.process_rollouts / await play(store, scale.process_rollouts))
            progress.advance(bar)
    return {"rollouts_per_s_process": round(median(rates), 1)}


async def tracing(scale: Scale, progress: Progress) -> Figures:
    """What tracing adds to a call of OpenAI's async client; the endpoint answers from this process' memory."""
    body = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "policy",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "word " * 50}}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 50, "total_tokens": 250},
    }
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=body))
    messages: list[Any] = [{"role": "user", "content": "question " * 200}]
    times: dict[bool, list[float]] = {True: [], False: []}
    bar = progress.add_task("tracing of model calls", total=2 * scale.windows)
    async with httpx.AsyncClient(transport=transport) as http:
        client = AsyncOpenAI(base_url="http://stub/v1", api_key="key", http_client=http)

        async def calls(count: int) -> float:
            trace = AttemptTrace("ro", "at")
            with traced(trace):
                began = time.process_time()
                for _ in range(count):
                    await client.chat.completions.create(model="policy", messages=messages)
                seconds = time.process_time() - began
            if len(trace.spans) != count * is_traced:
                raise RuntimeError(f"{count} calls left {len(trace.spans)} spans, traced: {is_traced}")
            return seconds / count * 1e6

        is_traced = False
        await calls(scale.calls)
        for window in range(2 * scale.windows):
            for is_traced in (True, False) if window % 2 else (False, True):
                (instrument_openai if is_traced else uninstrument_openai)()
                times[is_traced].append(await calls(scale.calls))
            progress.advance(bar)
        uninstrument_openai()
    return {
        "tracing_us_per_call": round(median(times[True]) - median(times[False]), 1),
        "untraced_us_per_call": round(median(times[False]), 1),
    }


async def recovery(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """From kill -9 of a runner until all that it played is played again: by another runner, or by its successor."""
    bar = progress.add_task("killed runners", total=2 * scale.recoveries)
    figures: Figures = {}
    for key, runners in (("recovery_s_other_runner", 2), ("recovery_s_only_runner", 1)):
        seconds = []
        async with playing(folder, key, sleeper, runners, concurrency=2 * LOST) as (store, pool):
            for _ in range(scale.recoveries):
                seconds.append(await _recover(store, pool, runners))
                progress.advance(bar)
        figures[key] = round(max(seconds), 2)
    return {"recovery_s_runner_kill": max(figures.values()), **figures}


async def _recover(store: Store, pool: RunnerPool, runners: int) -> float:
    task = {"seconds": PATIENCE_SECONDS}
    queued = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=task) for _ in range(LOST * runners)])
    ids = [rollout.rollout_id for rollout in queued]
    before = await _attempts(store, ids, 1)
    victims = {attempt.worker_id for attempt in before}
    runner = next(runner for runner in pool.status() if runner["worker_id"] in victims)
    lost = [attempt.rollout_id for attempt in before if attempt.worker_id == runner["worker_id"]]
    killed = time.time()
    os.kill(runner["pid"], signal.SIGKILL)
    after = await _attempts(store, lost, 2)
    seconds = max(attempt.start_time for attempt in after) - killed
    await _clear(store, pool, ids, runners)
    return seconds


async def _attempts(store: Store, ids: list[str], number: int) -> list[Any]:
    """The attempts of that number of each rollout, when all are being played."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        found = await store.query_rollouts(rollout_id_in=ids)
        attempts = [rollout.attempt for rollout in found if hasattr(rollout, "attempt")]
        if len(attempts) == len(ids) and all(attempt.sequence_id == number for attempt in attempts):
            return attempts
        await asyncio.sleep(0.02)
    raise RuntimeError(f"attempt {number} did not begin within {PATIENCE_SECONDS:.0f} s")


async def _clear(store: Store, pool: RunnerPool, ids: list[str], runners: int) -> None:
    rollouts = await store.query_rollouts(rollout_id_in=ids)
    finishes = [Finish(rollout.rollout_id, rollout.attempt.attempt_id, "failed") for rollout in rollouts]  # type: ignore[attr-defined]
    await store.finish_many_attempts(finishes)
    while len([runner for runner in pool.status() if runner["pid"]]) < runners:
        await asyncio.sleep(0.05)
    await asyncio.sleep(4.0)  # the runners hear of it at their next heartbeat


async def random_kills(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """A load of rollouts while runners are killed at random."""
    bar = progress.add_task("random kills", total=scale.kills)
    async with playing(folder, "chaos", sleeper, 4, concurrency=8) as (store, pool):
        return await chaos(pool, store, scale.kills, CHAOS_PAUSE_SECONDS, lambda: progress.advance(bar))
