"""How attempts end in a runner, beyond returns: hooks, spans on the way, timeouts, agents that do not stop, drains."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray import runner as runner_module
from lightning_ray.deaths.last_words import last_words
from lightning_ray.errors import InfrastructureError
from lightning_ray.hooks import Hook
from lightning_ray.runner import Runner
from lightning_ray.running import play as play_module
from lightning_ray.running import rest as rest_module
from lightning_ray.running import threads as threads_module
from lightning_ray.running import watchdog as watchdog_module
from lightning_ray.running.sizing import Sizing, crowded_node
from lightning_ray.running.watchdog import Watchdog
from lightning_ray.store import LocalStoreClient, SpanStore, read_spans
from lightning_ray.store import service as service_module
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import RolloutConfig, Span

SECRET = b"s" * 32
ENDPOINT = lr.LLM(endpoint="http://host:1/v1", model="policy")
both = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(runner_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(runner_module, "EXPORT_SECONDS", 0.05)
    monkeypatch.setattr(runner_module, "LEASE_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(rest_module, "FIRST_SECONDS", 0.1)


class Counting(LocalStoreClient):
    """Counts calls by name, and refuses some."""

    def __init__(self, store: SpanStore):
        super().__init__(store)
        self.counts: dict[str, int] = {}
        self.refused: dict[str, Exception] = {}

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self.refused:
            raise self.refused[name]
        return await super()._call(name, *args, timeout=timeout)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Counting]:
    client = Counting(SpanStore(tmp_path, fsync="none"))
    await client.update_resources("sampled", {"main_llm": ENDPOINT})
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def playing(store: Any, agent: Any, concurrency: int = 8, **options: Any) -> AsyncIterator[Runner]:
    runner = Runner(agent, store, "w-1", SECRET, concurrency, **options)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def ended(store: Any, *rollouts: Any, timeout: float = 10.0) -> list[Any]:
    ids = [rollout.rollout_id for rollout in rollouts]
    assert len(await store.wait_for_rollouts(rollout_ids=ids, timeout=timeout)) == len(ids)
    return (await store.query_rollouts(rollout_id_in=ids)).items


async def spans_of(store: Any, rollout: Any) -> list[Span]:
    return read_spans(await store.scan_spans([rollout.rollout_id]))


def names(spans: list[Span]) -> list[Any]:
    return [span.attributes.get("name", span.name) for span in spans]


async def until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def block(seconds: float) -> None:
    time.sleep(seconds)


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


def test_a_runner_rests_longer_and_longer_and_no_longer_than_needed() -> None:
    rest, now = rest_module.Rest(), time.monotonic()
    for _ in range(2):
        rest.note(now, failed=True)
        rest.note(now, failed=True)
        assert not rest.seconds
        rest.note(now, failed=False)
    lengths = []
    for _ in range(3):
        rest.note(now, failed=True)
    for _ in range(3):
        lengths.append(rest.seconds)
        rest.note(now, failed=True)  # of an attempt from before this rest
        assert rest.seconds <= lengths[-1]
        rest.note(time.monotonic() + 60, failed=True)
    assert lengths[0] > 0 and lengths[1] > 1.5 * lengths[0] and lengths[2] > 1.5 * lengths[1]
    rest.note(now, failed=False)
    assert not rest.seconds


async def test_the_watchdog_beats_while_the_loop_is_blocked_and_ends_the_process_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog_module, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(watchdog_module, "HEARTBEAT_AFTER", 1.0)
    monkeypatch.setattr(watchdog_module, "BLOCKED_SECONDS", 3.0)
    calls: list[Any] = []
    over = threading.Event()

    class Deaf:
        async def heartbeat(self, worker_id: str, keys: Any) -> list[Any]:
            calls.append((worker_id, keys))
            return []

    watchdog = Watchdog(Deaf(), "w-1", lambda: [], over.set)  # type: ignore[arg-type]
    await asyncio.sleep(0.3)
    assert not calls and not over.is_set()
    block(1.5)
    assert calls[0] == ("w-1", []) and not over.is_set()
    block(2.0)
    assert over.is_set()
    watchdog.close()


def test_the_number_of_runners_follows_the_work() -> None:
    from lightning_ray.config import RunnerSettings

    sizing = Sizing(RunnerSettings(minimum=1, maximum=4, concurrency=10), shrink_seconds=5.0)
    assert [sizing.wanted(work) for work in (0, 10, 11, 35, 1000)] == [1, 1, 2, 4, 4]
    assert sizing.change(1, 35, now=0.0) == 3
    assert [sizing.change(4, 0, now) for now in (1.0, 5.9, 6.0)] == [0, 0, -1]
    assert sizing.change(3, 0, 7.0) == 0 and sizing.change(3, 35, 8.0) == 1
    assert sizing.change(3, 0, 12.0) == 0, "the time counts from the last need"


def test_a_crowded_node_is_one_with_two_more_than_another() -> None:
    assert crowded_node({"a": 2}, ["a"]) is None
    assert crowded_node({"a": 2, "b": 1}, ["a", "b"]) is None
    assert crowded_node({"a": 2}, ["a", "b"]) == ("a", "b")
    assert crowded_node({"a": 1, "gone": 3}, ["a", "b"]) is None


def test_last_words_leave_out_what_is_of_no_use() -> None:
    frames = "\n".join(f'  File "x.py", line {n} in f' for n in range(9))
    text = f":job_id:01\nfirst\n\nFatal Python error: Aborted\n\nCurrent thread:\n{frames}\nExtension modules: a, b"
    assert last_words(text).split(" | ") == [
        "first",
        "Fatal Python error: Aborted",
        *(f'File "x.py", line {n} in f' for n in range(4)),
    ]
    assert last_words("") == ""


def test_why_a_replica_is_ended_is_its_last_word_whatever_serve_writes_after_it() -> None:
    why = "Health check failed: the replica hangs"
    later = [f"line {number}" for number in range(40)]
    assert last_words("\n".join(["before", why, *later[:20], f"{why} still", *later[20:30]])) == f"{why} still"
    assert last_words("\n".join([why, *later])).split(" | ") == later[-8:], "that was long ago"
