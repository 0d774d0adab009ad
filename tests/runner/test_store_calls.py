"""What a runner tells its store, and what it does when that refuses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray import runner as runner_module
from lightning_ray.runner import Runner
from lightning_ray.types import EnqueueRolloutRequest as Request
from tests.runner.parts import SECRET, Counting, Waiting, agent_of, play, playing, rewards_of, until


async def test_an_end_that_cannot_be_reported_is_told_and_the_runner_goes_on(
    store: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    store.refused["finish_many_attempts"] = lr.StoreError("finish_many_attempts is refused")
    await store.enqueue_many_rollouts([Request(input={})])
    async with playing(store, agent_of(lambda: 1.0, True), concurrency=1):
        await until(lambda: "could not be reported" in caplog.text)
        assert "finish_many_attempts is refused" in caplog.text
        store.refused.clear()
        [after] = await store.enqueue_many_rollouts([Request(input={})])
        [ended] = await store.wait_for_rollouts(rollout_ids=[after.rollout_id], timeout=5)
        assert ended.status == "succeeded"


async def test_a_heartbeat_that_fails_is_told_and_tried_again(
    store: Counting, caplog: pytest.LogCaptureFixture, quick_heart: None
) -> None:
    waiting = Waiting()
    [rollout] = await store.enqueue_many_rollouts([Request(input={})])
    async with playing(store, waiting.agent):
        await asyncio.wait_for(waiting.begun.wait(), 5)
        store.refused["heartbeat"] = lr.StoreError("heartbeat is refused")
        await until(lambda: "heartbeat of runner w-1 failed" in caplog.text)
        store.refused.clear()
        await store.update_rollout(rollout.rollout_id, status="cancelled")
        await asyncio.wait_for(waiting.cancelled.wait(), 5)


async def test_a_store_that_refuses_leases_ends_the_runner_with_its_error(store: Counting) -> None:
    store.refused["dequeue_many_rollouts"] = lr.StoreError("dequeue_many_rollouts is refused")
    with pytest.raises(lr.StoreError, match="dequeue_many_rollouts is refused"):
        await asyncio.wait_for(Runner(agent_of(lambda: 1.0, True), store, "w-1", SECRET).run(), 5)


async def test_spans_on_their_way_with_the_end_are_not_sent_beside_it(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[int] = []
    on_their_way = False
    append, finish = store.append_spans, store.finish_many_attempts

    async def counted(batch: Any, synced: bool = True) -> Any:
        if on_their_way:
            beside.append(batch.num_rows)
        return await append(batch, synced)

    async def slow(*ends: Any) -> Any:
        nonlocal on_their_way
        on_their_way = True
        await asyncio.sleep(0.2)
        on_their_way = False
        return await finish(*ends)

    monkeypatch.setattr(runner_module, "EXPORT_SECONDS", 0.01)
    monkeypatch.setattr(store, "append_spans", counted)
    monkeypatch.setattr(store, "finish_many_attempts", slow)
    [rollout] = await play(store, agent_of(lambda: 1.0, True))
    assert await rewards_of(store, rollout) == [1.0] and not beside


async def test_a_lease_asks_for_a_sixteenth_of_many_slots(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    dequeue = store.dequeue_many_rollouts

    async def counted(*, limit: int, **more: Any) -> Any:
        asked.append(limit)
        return await dequeue(limit=limit, **more)

    async def waits(task: Any, llm: lr.LLM) -> float:
        await asyncio.sleep(task["seconds"])
        return 1.0

    monkeypatch.setattr(store, "dequeue_many_rollouts", counted)
    await play(store, lr.rollout(waits), *(Request(input={"seconds": 0.3}) for _ in range(100)), concurrency=640)
    assert asked[:3] == [40, 40, 40]  # a sixteenth of the slots, as long as that many are free
