"""How attempts end in a runner, beyond returns: hooks, spans on the way, timeouts, agents that do not stop, drains."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray import runner as runner_module
from lightning_ray.errors import InfrastructureError
from lightning_ray.hooks import Hook
from lightning_ray.runner import Runner
from lightning_ray.running import play as play_module
from lightning_ray.running import rest as rest_module
from lightning_ray.running import threads as threads_module
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import RolloutConfig, Span
from tests.runner.parts import SECRET, both, ended, playing, spans_of, until


@pytest.fixture(autouse=True)
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(runner_module, "EXPORT_SECONDS", 0.05)
    monkeypatch.setattr(runner_module, "LEASE_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(rest_module, "FIRST_SECONDS", 0.1)


def names(spans: list[Span]) -> list[Any]:
    return [span.attributes.get("name", span.name) for span in spans]


class Recorder(Hook):
    """Notes every moment, and emits in those that are traced."""

    def __init__(self) -> None:
        self.moments: list[Any] = []

    async def on_rollout_start(self, **given: Any) -> None:
        self.moments.append(("on_rollout_start", sorted(given), given["runner"].worker_id))

    async def on_trace_start(self, **given: Any) -> None:
        self.moments.append(("on_trace_start", sorted(given)))
        lr.emit_annotation({"name": "start"})

    async def on_trace_end(self, **given: Any) -> None:
        self.moments.append(("on_trace_end", sorted(given)))
        lr.emit_annotation({"name": "end"})
        raise ValueError("a hook's own defect")

    async def on_rollout_end(self, **given: Any) -> None:
        self.moments.append(("on_rollout_end", names(given["spans"])))


@both
async def test_hooks_see_their_four_moments(store: Any, is_async: bool) -> None:
    def sync_agent(task: Any, llm: Any) -> float:
        lr.emit_annotation({"name": "agent"})
        return 1.0

    async def agent(task: Any, llm: Any) -> float:
        return sync_agent(task, llm)

    hook = Recorder()
    rollout = await store.enqueue_rollout({})
    async with playing(store, lr.rollout(agent if is_async else sync_agent), hooks=hook):
        [rollout] = await ended(store, rollout)
    reward = "agentlightning.annotation"
    assert rollout.status == "succeeded"
    assert hook.moments == [
        ("on_rollout_start", ["agent", "rollout", "runner"], "w-1"),
        ("on_trace_start", ["agent", "rollout", "runner", "tracer"]),
        ("on_trace_end", ["agent", "rollout", "runner", "tracer"]),
        ("on_rollout_end", ["start", "agent", "end", reward]),
    ]
    assert names(await spans_of(store, rollout)) == ["start", "agent", "end", reward]


async def test_the_agent_knows_its_runner_and_tracer(store: Any) -> None:
    class Agent(lr.LitAgent[Any]):
        async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            assert self.runner.worker_id == "w-1"
            self.tracer.create_span("mine", {"name": "mine"})
            return 1.0

    rollout = await store.enqueue_rollout({})
    async with playing(store, Agent()):
        [rollout] = await ended(store, rollout)
    assert rollout.status == "succeeded" and names(await spans_of(store, rollout))[0] == "mine"


async def test_spans_reach_the_store_while_the_attempt_goes_on(store: Any) -> None:
    release = asyncio.Event()

    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        lr.emit_annotation({"name": "early"})
        await release.wait()
        return 1.0

    rollout = await store.enqueue_rollout({})
    async with playing(store, agent):
        while not await spans_of(store, rollout):
            await asyncio.sleep(0.01)
        assert (await store.get_rollout_by_id(rollout.rollout_id)).status == "running"
        release.set()
        [rollout] = await ended(store, rollout)
    assert names(await spans_of(store, rollout)) == ["early", "agentlightning.annotation"]


async def test_spans_that_could_not_be_sent_are_sent_again(store: Any) -> None:
    release = asyncio.Event()

    @lr.rollout
    async def agent(task: Any, llm: Any) -> None:
        lr.emit_annotation({"name": "early"})
        await release.wait()

    rollout = await store.enqueue_rollout({})
    store.refused["append_spans"] = InfrastructureError("out of reach")
    async with playing(store, agent):
        await until(lambda: store.counts.get("append_spans", 0) >= 2)
        release.set()
        [rollout] = await ended(store, rollout)
    assert names(await spans_of(store, rollout)) == ["early"]


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_what_was_emitted_before_and_while_being_cancelled_is_kept(store: Any, how: str) -> None:
    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        lr.emit_annotation({"name": "before"})
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            lr.emit_annotation({"name": "cleaning"})
        return 1.0

    config = RolloutConfig(timeout_seconds=0.2 if how == "timeout" else None)
    rollout = await store.enqueue_rollout({}, config=config)
    async with playing(store, agent) as runner:
        await until(lambda: runner.playing)
        if how == "cancel":
            await store.update_rollout(rollout.rollout_id, status="cancelled")
        [rollout] = await ended(store, rollout)
        await until(lambda: not runner.playing)
    assert names(await spans_of(store, rollout)) == ["before", "cleaning"]


async def test_a_slow_cancellation_holds_nobody_up(store: Any) -> None:
    clean = asyncio.Event()

    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        if task == "quick":
            return 1.0
        try:
            await asyncio.Event().wait()
        finally:
            await clean.wait()
        return 0.0

    slow = await store.enqueue_rollout("slow", config=RolloutConfig(timeout_seconds=0.05))
    async with playing(store, agent, concurrency=2) as runner:
        await ended(store, slow)
        quick = await store.enqueue_rollout("quick")
        await ended(store, quick)
        assert runner.playing
        clean.set()


async def test_a_sync_agent_ends_at_its_timeout_and_its_thread_is_ended(store: Any) -> None:
    begun, over = threading.Event(), threading.Event()

    @lr.rollout
    def agent(task: Any, llm: Any) -> float:
        begun.set()
        try:
            while True:
                time.sleep(0.01)
        finally:
            over.set()

    rollout = await store.enqueue_rollout({}, config=RolloutConfig(timeout_seconds=0.2))
    async with playing(store, agent, concurrency=4):
        began = time.monotonic()
        [rollout] = await ended(store, rollout)
        assert time.monotonic() - began < 5 and rollout.metadata["failure"]["kind"] == "timeout"
        await until(over.is_set)


async def test_stuck_threads_cost_the_runner(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "STUCK_SECONDS", 0.1)
    release = threading.Event()

    @lr.rollout
    def agent(task: Any, llm: Any) -> float:
        release.wait(10)  # in C, where no exception reaches it
        return 1.0

    config = RolloutConfig(timeout_seconds=0.1)
    queued = await store.enqueue_many_rollouts([Request(input={}, config=config) for _ in range(2)])
    runner = Runner(agent, store, "w-1", SECRET, 4)
    running = asyncio.create_task(runner.run())
    await ended(store, *queued)
    reason = await asyncio.wait_for(running, 10)
    release.set()
    assert "2 agents did not end when they were told to" in reason


async def test_an_agent_that_swallows_its_cancellation_costs_its_runner(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play_module, "CANCEL_SECONDS", 0.1)
    monkeypatch.setattr(play_module, "CANCEL_AGAIN", (0.05, 0.05))
    release = asyncio.Event()

    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        return 1.0

    rollout = await store.enqueue_rollout({}, config=RolloutConfig(timeout_seconds=0.1))
    running = asyncio.create_task(Runner(agent, store, "w-1", SECRET, 2).run())
    [rollout] = await ended(store, rollout)
    reason = await asyncio.wait_for(running, 10)
    release.set()
    assert rollout.metadata["failure"]["kind"] == "timeout" and "1 agents did not end" in reason


async def test_a_drained_runner_ends_what_it_plays_and_leases_no_more(store: Any) -> None:
    release = asyncio.Event()

    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        await release.wait()
        return 1.0

    rollout = await store.enqueue_rollout({})
    runner = Runner(agent, store, "w-1", SECRET, 4)
    running = asyncio.create_task(runner.run())
    await until(lambda: runner.playing)
    runner.drain("enough")
    await asyncio.sleep(0.3)
    later = await store.enqueue_rollout({})
    release.set()
    assert await asyncio.wait_for(running, 5) == "enough"
    [rollout, later] = (await store.query_rollouts(rollout_id_in=[rollout.rollout_id, later.rollout_id])).items
    assert (rollout.status, later.status) == ("succeeded", "queuing")


async def test_ends_that_come_together_are_told_together_and_one_refused_alone(store: Any) -> None:
    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        if task == "gone":
            await store.delete_rollouts([ids["gone"]])
        return 1.0

    queued = await store.enqueue_many_rollouts([Request(input=task) for task in ["gone", *["well"] * 15]])
    ids = {rollout.input: rollout.rollout_id for rollout in queued}
    async with playing(store, agent, concurrency=16):
        rollouts = await ended(store, *queued[1:])
    assert {rollout.status for rollout in rollouts} == {"succeeded"}
    assert store.counts["finish_many_attempts"] <= 18

    store.counts.clear()
    queued = await store.enqueue_many_rollouts([Request(input="well") for _ in range(16)])
    async with playing(store, agent, concurrency=16):
        await ended(store, *queued)
    assert store.counts["finish_many_attempts"] <= 4


async def test_a_failure_of_a_part_is_not_the_agents(store: Any) -> None:
    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        try:
            raise InfrastructureError("the sandbox is gone")
        except InfrastructureError as error:
            raise RuntimeError("a framework's words") from error

    rollout = await store.enqueue_rollout({})
    async with playing(store, agent):
        [rollout] = await ended(store, rollout)
    assert rollout.metadata["failure"] == {"kind": "infrastructure", "reason": "RuntimeError: a framework's words"}


async def test_an_outage_does_not_use_up_what_chances_rollouts_have(store: Any) -> None:
    outage = asyncio.Event()
    tries: list[float] = []

    @lr.rollout
    async def agent(task: Any, llm: Any) -> float:
        if not tries:
            asyncio.get_running_loop().call_later(1.0, outage.set)
        tries.append(time.monotonic())
        if not outage.is_set():
            raise InfrastructureError("the endpoint restarts")
        return 1.0

    queued = await store.enqueue_many_rollouts([Request(input=number) for number in range(8)])
    async with playing(store, agent):
        rollouts = await ended(store, *queued)
    assert {rollout.status for rollout in rollouts} == {"succeeded"}
    assert len(tries) <= 8 * 6
