"""Late steps: told once the time is up, with what everyone is at, ever rarer; parts that do not answer are named."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.run import lateness as lateness_module
from lightning_ray.run.lateness import Lateness, replicas_at_work, rollouts_at_work, runners_at_work
from lightning_ray.run.phases import PhaseClock
from lightning_ray.store import LocalStoreClient, SpanStore
from lightning_ray.types import EnqueueRolloutRequest
from lightning_ray.waiting import oldest_wait, open_waits, waiting


def test_open_waits_are_told_the_longest_first() -> None:
    assert open_waits() == [] and oldest_wait() is None
    with waiting("8 rollouts"), waiting("8 rollouts"), waiting("a swap", lambda: "1 of 2 replicas"):
        assert open_waits(time.monotonic() + 60) == [
            "8 rollouts, since 60 s, and 1 more like it",
            "a swap, since 60 s: 1 of 2 replicas",
        ]
    with pytest.raises(RuntimeError), waiting("what fails"):
        raise RuntimeError
    with PhaseClock().phase("update"):
        assert open_waits()[0].startswith("the phase 'update', since 0 s")
    assert open_waits() == []


def test_a_step_is_late_by_what_steps_took_and_told_ever_rarer() -> None:
    now = [0.0]
    late = Lateness(lambda title, lines: None, {}, lambda: now[0])
    late.step(0)
    assert late.limit() == 60.0
    for number in range(5):
        late.step(number + 1, 20.0)
    assert late.limit() == 100.0
    now[0] = 99.0
    assert late.late() is None
    now[0] = 100.0
    assert late.late() == "step 5 lasts 100 s; steps took 20 s so far. What everyone is at:"
    late._told = 1
    assert late.late() is None and late.limit() == 200.0


def test_before_the_first_step_it_is_a_wait_that_is_late() -> None:
    now = [time.monotonic()]
    late = Lateness(lambda title, lines: None, {}, lambda: now[0])
    assert late.late() is None
    with waiting("the deployment of the policy"):
        now[0] += 100
        assert late.late() is None
        now[0] += 30
        assert late.late() == "the start of the run waits since 130 s"


async def test_everyone_is_asked_and_who_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lateness_module, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(lateness_module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(lateness_module, "STEP_SECONDS", 0.1)
    told: list[tuple[str, list[str]]] = []

    async def well() -> str:
        return "2 up"

    async def silent() -> str:
        await asyncio.sleep(10)
        return ""

    async def broken() -> str:
        raise OSError("no way")

    late = Lateness(
        lambda title, lines: told.append((title, list(lines))), {"runners": well, "replicas": silent, "store": broken}
    )
    late.step(7)
    late.start()
    with waiting("64 rollouts"):
        async with asyncio.timeout(5):
            while len(told) < 2:
                await asyncio.sleep(0.01)
    late.stop()
    title, lines = told[0]
    assert title.startswith("step 7 lasts ")
    assert lines[0].startswith("waits for 64 rollouts, since ")
    assert lines[1:] == ["runners: 2 up", "replicas: no answer within 0 s", "store: OSError: no way"]


async def test_the_rollout_that_is_played_longest_is_named(tmp_path: Path) -> None:
    store = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    assert await rollouts_at_work(store) == "none"
    first, *_ = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=number) for number in range(3)])
    begun = await store.dequeue_rollout("runner-0-a1")
    assert begun is not None and begun.rollout_id == first.rollout_id
    await store.update_attempt(begun.rollout_id, begun.attempt.attempt_id, status="running")
    assert await rollouts_at_work(store) == (
        f"2 queuing, 1 running; longest: {first.rollout_id}, since 0 s on runner-0-a1"
    )
    await store.close()


def test_what_runners_and_replicas_are_at_is_told_in_a_line() -> None:
    runners: list[dict[str, Any]] = [{"name": f"runner-{n}", "pid": n or None, "playing": n} for n in range(3)]
    told = "2 up (runner-1 plays 1, runner-2 plays 2); starting, or waiting for a CPU: runner-0"
    assert runners_at_work(runners) == told
    replica = {"replica_id": "a1", "running": 3, "waiting": 1, "version": 4, "proved": False, "swapping": True}
    assert replicas_at_work([{**replica, "swapping_since": time.time() - 9}]) == (
        "a1 3 calls running, 1 waiting, version 4, not proved, a swap open since 9 s"
    )
    oldest = {"attempt": "at-1", "stage": "being stored", "seconds": 95.2}
    assert replicas_at_work([{**replica, "swapping": False, "proved": True, "oldest_call": oldest}]) == (
        "a1 3 calls running, 1 waiting, its oldest call being stored after 95 s, version 4"
    )
    assert replicas_at_work([]) == "none is up"
