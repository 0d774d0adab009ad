"""Attempts that are cancelled, take too long, or are at work when the runner stops."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import lightning_ray as lr
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import RolloutConfig
from tests.runner.parts import Waiting, playing, rewards_of


async def test_a_cancelled_rollout_is_cancelled_in_the_agent(store: Any, quick_heart: None) -> None:
    waiting = Waiting()
    [rollout] = await store.enqueue_many_rollouts([Request(input={})])
    async with playing(store, waiting.agent, concurrency=1):
        await asyncio.wait_for(waiting.begun.wait(), 5)
        await store.update_rollout(rollout.rollout_id, status="cancelled")
        await asyncio.wait_for(waiting.cancelled.wait(), 5)
        [after] = await store.enqueue_many_rollouts([Request(input={"quick": True})])
        [ended] = await store.wait_for_rollouts(rollout_ids=[after.rollout_id], timeout=5)
        assert ended.status == "succeeded"
    [rollout] = await store.query_rollouts(rollout_id_in=[rollout.rollout_id])
    assert rollout.status == "cancelled"


async def test_a_rollout_that_takes_too_long_is_ended(store: Any, quick_heart: None) -> None:
    waiting = Waiting()
    [rollout] = await store.enqueue_many_rollouts([Request(input={}, config=RolloutConfig(timeout_seconds=0.1))])
    async with playing(store, waiting.agent):
        [ended] = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=5)
        assert ended.status == "failed" and ended.metadata["failure"]["kind"] == "timeout"
        await asyncio.wait_for(waiting.cancelled.wait(), 5)


async def test_an_agent_that_ends_after_its_timeout_changes_nothing(store: Any) -> None:
    """The end that comes late, in spite of the cancellation, does not count; what was emitted is kept."""
    release = asyncio.Event()

    @lr.rollout
    async def agent(task: Any, llm: lr.LLM) -> float:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        return 1.0

    [rollout] = await store.enqueue_many_rollouts([Request(input={}, config=RolloutConfig(timeout_seconds=0.1))])
    async with playing(store, agent):
        await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=5)
        release.set()
        [after] = await store.enqueue_many_rollouts([Request(input={})])
        [ended] = await store.wait_for_rollouts(rollout_ids=[after.rollout_id], timeout=5)
        assert ended.status == "succeeded"
    [rollout] = await store.query_rollouts(rollout_id_in=[rollout.rollout_id])
    assert rollout.status == "failed" and rollout.metadata["failure"]["kind"] == "timeout"
    assert await rewards_of(store, rollout) == [1.0]


async def test_stopping_the_runner_cancels_what_it_plays(store: Any) -> None:
    waiting = Waiting()
    [rollout] = await store.enqueue_many_rollouts([Request(input={})])
    async with playing(store, waiting.agent):
        await asyncio.wait_for(waiting.begun.wait(), 5)
    assert waiting.cancelled.is_set()
    [rollout] = await store.query_rollouts(rollout_id_in=[rollout.rollout_id])
    assert rollout.status in ("preparing", "running")
