"""Runners killed at random under load: is every rollout ended, once?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.compute as pc

from actors.runner_pool import RunnerPool
from lightning_ray.store.base import Store
from lightning_ray.types import AttemptedRollout, EnqueueRolloutRequest

PATIENCE_SECONDS = 120.0
QUEUED = 200
"""Rollouts that there are always to do while runners are killed."""
PLAY_SECONDS = 0.3


async def chaos(
    pool: RunnerPool,
    store: Store,
    kills: int,
    seconds_between: float,
    tick: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, Any]:
    """Kill ``kills`` runners, one at a time, each while it plays rollouts; then wait for all. What became of them.

    The pool's agent sleeps ``task["seconds"]`` and returns a reward. ``lost`` have not ended well; ``duplicated`` have
    more than one attempt that succeeded, or more than one reward in the attempt that counts.
    """
    chance, ids, began = random.Random(seed), list[str](), time.perf_counter()
    killed = 0
    while killed < kills:
        await _fill(store, ids)
        await asyncio.sleep(seconds_between * chance.uniform(0.5, 1.5))
        if pids := await _at_work(pool, store):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
                killed += 1
                tick()
    ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=PATIENCE_SECONDS)
    seconds = time.perf_counter() - began
    succeeded = {rollout.rollout_id for rollout in ended if rollout.status == "succeeded"}
    return {
        "kills": killed,
        "chaos_rollouts": len(ids),
        "chaos_seconds": round(seconds, 1),
        "lost": len(ids) - len(succeeded),
        "given_up": sum(rollout.status == "failed" for rollout in ended),
        "duplicated": await _duplicated(store, ids),
        "chaos_attempts": await _attempts(store, ids),
    }


async def _at_work(pool: RunnerPool, store: Store) -> list[int]:
    """The processes that play something."""
    played = await store.query_rollouts(status_in=["preparing", "running"])
    workers = {rollout.attempt.worker_id for rollout in played if isinstance(rollout, AttemptedRollout)}
    return [runner["pid"] for runner in pool.status() if runner["pid"] and runner["worker_id"] in workers]


async def _fill(store: Store, ids: list[str]) -> None:
    missing = QUEUED - (await store.statistics())["queued"]
    if missing > 0:
        task = {"seconds": PLAY_SECONDS}
        queued = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=task) for _ in range(missing)])
        ids += [rollout.rollout_id for rollout in queued]


async def _duplicated(store: Store, ids: Sequence[str]) -> int:
    """Rollouts that count more than once."""
    spans = await store.scan_spans(ids, None, ["rollout_id", "attempt_id", "name", "reward"])
    rewards = spans.filter(pc.is_valid(spans["reward"]))
    pairs = list(zip(rewards["rollout_id"].to_pylist(), rewards["attempt_id"].to_pylist(), strict=True))
    several = 0
    rewarded: dict[str, list[str]] = {}
    for rollout_id, attempt_id in pairs:
        rewarded.setdefault(rollout_id, []).append(attempt_id)
    for rollout_id, attempt_ids in rewarded.items():
        if len(attempt_ids) > 1:
            good = [a.attempt_id for a in await store.query_attempts(rollout_id) if a.status == "succeeded"]
            several += len(good) != 1 or attempt_ids.count(good[0]) != 1
    return several


async def _attempts(store: Store, ids: Sequence[str]) -> int:
    rollouts = await store.query_rollouts(rollout_id_in=ids)
    return sum(rollout.attempt.sequence_id for rollout in rollouts if isinstance(rollout, AttemptedRollout))
