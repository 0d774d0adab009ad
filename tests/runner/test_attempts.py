"""Attempts side by side: how many at once, each with its own spans, method, resources, address and key."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.capture.keys import KeyRefused, open_key
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import RolloutConfig
from tests.runner.parts import SECRET, both, play, rewards_of, spans_of


@both
async def test_no_more_than_concurrency_are_played_at_once_and_no_fewer(store: Any, is_async: bool) -> None:
    lock, full, running, most = threading.Lock(), threading.Event(), 0, 0

    def enter(change: int) -> None:
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)
            if running == 20:
                full.set()

    if is_async:

        @lr.rollout
        async def agent(task: Any, llm: lr.LLM) -> float:
            enter(1)
            async with asyncio.timeout(10):
                while not full.is_set():
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            enter(-1)
            return 1.0
    else:

        @lr.rollout
        def agent(task: Any, llm: lr.LLM) -> float:
            enter(1)
            full.wait(10)
            time.sleep(0.05)
            enter(-1)
            return 1.0

    rollouts = await play(store, agent, *[Request(input={}) for _ in range(60)], concurrency=20)
    assert {r.status for r in rollouts} == {"succeeded"} and most == 20 and running == 0


@both
async def test_spans_never_land_in_another_rollout(store: Any, is_async: bool) -> None:
    def emit(task: dict[str, int], part: int) -> None:
        lr.emit_annotation({"number": task["number"], "part": part})

    if is_async:

        @lr.rollout
        async def agent(task: dict[str, int], llm: lr.LLM) -> float:
            for part in range(3):
                emit(task, part)
                await asyncio.sleep(task["number"] % 7 / 1000)
            await asyncio.gather(*(asyncio.to_thread(emit, task, part) for part in (3, 4)))
            return task["number"]
    else:

        @lr.rollout
        def agent(task: dict[str, int], llm: lr.LLM) -> float:
            for part in range(5):
                emit(task, part)
                time.sleep(task["number"] % 7 / 1000)
            return task["number"]

    rollouts = await play(store, agent, *[Request(input={"number": n}) for n in range(100)], concurrency=100)
    for rollout in rollouts:
        number = rollout.input["number"]
        spans = await spans_of(store, rollout)
        parts = [span.attributes for span in spans if "part" in span.attributes]
        assert sorted(part["part"] for part in parts) == list(range(5))
        assert {part["number"] for part in parts} == {number}
        assert await rewards_of(store, rollout) == [number]
        assert len({span.trace_id for span in spans}) == 1


async def test_the_mode_chooses_the_agents_method_and_its_resources(store: Any) -> None:
    class Agent(lr.LitAgent[Any]):
        def training_rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

        def validation_rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            assert list(resources) == ["main_llm"] and rollout.attempt.attempt_id
            return 2.0

    modes: list[Any] = ["train", "val", "test", None]
    rollouts = await play(store, Agent(), *[Request(input={}, mode=mode) for mode in modes])
    assert [await rewards_of(store, r) for r in rollouts] == [[1.0], [2.0], [2.0], [1.0]]


async def test_each_attempt_gets_an_address_and_a_key_of_its_own(store: Any) -> None:
    given: list[tuple[lr.LLM, Any]] = []

    @lr.rollout
    async def agent(task: Any, llm: lr.LLM, rollout: Any) -> float:
        given.append((llm, rollout))
        if rollout.attempt.sequence_id == 1:
            raise ValueError("once more")
        return 1.0

    config = RolloutConfig(timeout_seconds=50.0, max_attempts=2, retry_condition=["failed"])
    [rollout] = await play(store, agent, Request(input={}, config=config))
    assert rollout.status == "succeeded" and len(given) == 2
    for llm, played in given:
        attempt_id = played.attempt.attempt_id
        assert llm.endpoint == f"http://host:1/rollout/{rollout.rollout_id}/attempt/{attempt_id}/v1"
        claims = open_key(SECRET, str(llm.api_key))
        assert (claims.rollout_id, claims.attempt_id) == (rollout.rollout_id, attempt_id)
        assert claims.sampling == {"temperature": 1.0} and 45 < claims.expires - time.time() <= 50
        with pytest.raises(KeyRefused):
            open_key(b"other", str(llm.api_key))
    assert given[0][0].api_key != given[1][0].api_key
