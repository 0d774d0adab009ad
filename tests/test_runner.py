"""The runner with a real store in this process: whatever the agent does, its attempt ends once, with its spans."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openai
import pytest

import lightning_ray as lr
from lightning_ray import runner as runner_module
from lightning_ray.capture.keys import KeyRefused, open_key
from lightning_ray.runner import Runner
from lightning_ray.running import rest as rest_module
from lightning_ray.store import LocalStoreClient, SpanStore, read_spans
from lightning_ray.store import service as service_module
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import ProxyLLM, RolloutConfig, Span

SECRET = b"s" * 32
ENDPOINT = ProxyLLM(endpoint="http://host:1/v1", model="policy", sampling_parameters={"temperature": 1.0})


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(rest_module, "FIRST_SECONDS", 0.01)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalStoreClient]:
    client = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    await client.update_resources("sampled", {"main_llm": ENDPOINT})
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def playing(store: Any, agent: Any, concurrency: int = 8) -> AsyncIterator[None]:
    task = asyncio.create_task(Runner(agent, store, "w-1", SECRET, concurrency).run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def play(
    store: Any, agent: Any, *requests: Request, concurrency: int = 8, timeout: float = 10.0
) -> list[lr.Rollout]:
    """Play the requests to their end; fails if one does not end."""
    queued = await store.enqueue_many_rollouts(requests or [Request(input={})])
    ids = [rollout.rollout_id for rollout in queued]
    async with playing(store, agent, concurrency):
        ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=timeout)
    assert len(ended) == len(ids)
    return (await store.query_rollouts(rollout_id_in=ids)).items


async def spans_of(store: Any, rollout: lr.Rollout) -> list[Span]:
    return read_spans(await store.scan_spans([rollout.rollout_id]))


async def rewards_of(store: Any, rollout: lr.Rollout) -> list[Any]:
    found = [span.attributes.get("agentlightning.reward.0.value") for span in await spans_of(store, rollout)]
    return [value for value in found if value is not None]


def agent_of(play_one: Callable[[], Any], is_async: bool) -> Any:
    if is_async:

        async def agent(task: Any, llm: lr.LLM) -> Any:
            await asyncio.sleep(0)
            return play_one()

        return lr.rollout(agent)

    def sync_agent(task: Any, llm: lr.LLM) -> Any:
        return play_one()

    return lr.rollout(sync_agent)


both = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])


@both
@pytest.mark.parametrize("reward", [0.5, 1, True, np.float32(0.5), np.float64(1.0)])
async def test_a_returned_number_is_the_reward(store: Any, is_async: bool, reward: Any) -> None:
    [rollout] = await play(store, agent_of(lambda: reward, is_async))
    assert rollout.status == "succeeded" and await rewards_of(store, rollout) == [float(reward)]


@both
async def test_an_agent_may_emit_its_rewards_and_return_none(store: Any, is_async: bool) -> None:
    def emitting() -> None:
        lr.emit_annotation({"step": 1})
        lr.emit_reward(0.25)

    [rollout] = await play(store, agent_of(emitting, is_async))
    spans = await spans_of(store, rollout)
    assert rollout.status == "succeeded" and await rewards_of(store, rollout) == [0.25]
    assert [span.sequence_id for span in spans] == [1, 2] and spans[0].attributes == {"step": 1}


@both
async def test_nothing_returned_and_nothing_emitted_is_no_reward(store: Any, is_async: bool) -> None:
    [rollout] = await play(store, agent_of(lambda: None, is_async))
    assert rollout.status == "succeeded" and await spans_of(store, rollout) == []


async def test_a_reward_of_several_dimensions_is_emitted(store: Any) -> None:
    [rollout] = await play(
        store, agent_of(lambda: lr.emit_reward({"a": 1.0, "b": 2.0}, primary_key="b") and None, True)
    )
    assert await rewards_of(store, rollout) == [2.0]


@both
@pytest.mark.parametrize("result", ["0.5", {"a": 1.0, "b": 2.0}, [1.0], object()])
async def test_any_other_result_fails_and_says_what_to_return(store: Any, is_async: bool, result: Any) -> None:
    [rollout] = await play(store, agent_of(lambda: result, is_async))
    assert rollout.status == "failed" and rollout.metadata is not None
    failure = rollout.metadata["failure"]
    assert failure["kind"] == "failed"
    assert re.search(f"agent' returned (a )?{type(result).__name__}", failure["reason"])
    assert "return a number" in failure["reason"]


def quit_early() -> None:
    sys.exit("bye")


def cancelled_inside() -> None:
    raise asyncio.CancelledError("a scope inside the agent")


def divide() -> None:
    lr.emit_annotation({"reached": 1})
    raise ZeroDivisionError("by zero")


@both
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (divide, "ZeroDivisionError: by zero"),
        (quit_early, "SystemExit: bye"),
        (cancelled_inside, "CancelledError: a scope inside the agent"),
    ],
)
async def test_an_agent_that_raises_fails_its_attempt_and_the_runner_goes_on(
    store: Any, is_async: bool, broken: Callable[[], Any], reason: str
) -> None:
    turns = iter([broken, lambda: 1.0])
    failed, well = await play(
        store, agent_of(lambda: next(turns)(), is_async), *[Request(input={}) for _ in range(2)], concurrency=1
    )
    assert failed.status == "failed" and failed.metadata == {"failure": {"kind": "failed", "reason": reason}}
    *_, last = await spans_of(store, failed)
    assert last.name == "agentlightning.exception" and last.status.status_code == "ERROR"
    assert last.attributes["exception.type"] == reason.split(":")[0]
    assert well.status == "succeeded"


async def test_what_was_emitted_before_an_exception_is_kept(store: Any) -> None:
    [rollout] = await play(store, agent_of(divide, True))
    assert [span.attributes.get("reached") for span in await spans_of(store, rollout)] == [1, None]


async def test_an_annotation_that_cannot_be_stored_fails_the_attempt_by_name(store: Any) -> None:
    def emitting() -> float:
        lr.emit_annotation({"fine": 1})
        lr.emit_annotation({"bad": object()})
        return 1.0

    [rollout] = await play(store, agent_of(emitting, True))
    assert rollout.status == "failed" and rollout.metadata is not None
    assert "attribute 'bad' is object" in rollout.metadata["failure"]["reason"]
    assert [span.name for span in await spans_of(store, rollout)][-1] == "agentlightning.exception"
    assert (await spans_of(store, rollout))[0].attributes == {"fine": 1}


def response_error(status: int) -> openai.APIStatusError:
    response: Any = SimpleNamespace(request=None, status_code=status, headers={})
    return openai.APIStatusError("no", response=response, body=None)


@pytest.mark.parametrize(
    ("error", "infrastructure"),
    [
        (openai.APIConnectionError(request=cast(Any, None)), True),
        (response_error(503), True),
        (response_error(400), False),
        (response_error(500), True),
    ],
)
async def test_an_endpoint_that_is_gone_is_not_the_agents_fault(
    store: Any, error: Exception, infrastructure: bool
) -> None:
    def lost() -> None:
        raise error

    [rollout] = await play(store, agent_of(lost, True))
    assert rollout.metadata is not None
    assert rollout.metadata["failure"]["kind"] == ("infrastructure" if infrastructure else "failed")
    attempts = await store.query_attempts(rollout.rollout_id)
    assert len(attempts) == (6 if infrastructure else 1)


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


@pytest.fixture
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HEARTBEAT_SECONDS", 0.02)


class Waiting:
    """An agent that waits for ever, and tells what happened to it."""

    def __init__(self) -> None:
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()

        @lr.rollout
        async def agent(task: Any, llm: lr.LLM) -> float:
            if task.get("quick"):
                return 1.0
            self.begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return 0.0

        self.agent = agent


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


class Flaky(LocalStoreClient):
    """A store that refuses some calls."""

    refused: str = ""

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        if name == self.refused:
            raise lr.StoreError(f"{name} is refused")
        return await super()._call(name, *args, timeout=timeout)


@pytest.fixture
async def flaky(tmp_path: Path) -> AsyncIterator[Flaky]:
    client = Flaky(SpanStore(tmp_path, fsync="none"))
    await client.update_resources("sampled", {"main_llm": ENDPOINT})
    yield client
    await client.close()


async def test_an_end_that_cannot_be_reported_is_told_and_the_runner_goes_on(
    flaky: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    flaky.refused = "finish_many_attempts"
    await flaky.enqueue_many_rollouts([Request(input={})])
    async with playing(flaky, agent_of(lambda: 1.0, True), concurrency=1):
        while "could not be reported" not in caplog.text:
            await asyncio.sleep(0.001)
        assert "finish_many_attempts is refused" in caplog.text
        flaky.refused = ""
        [after] = await flaky.enqueue_many_rollouts([Request(input={})])
        [ended] = await flaky.wait_for_rollouts(rollout_ids=[after.rollout_id], timeout=5)
        assert ended.status == "succeeded"


async def test_a_heartbeat_that_fails_is_told_and_tried_again(
    flaky: Flaky, caplog: pytest.LogCaptureFixture, quick_heart: None
) -> None:
    waiting = Waiting()
    [rollout] = await flaky.enqueue_many_rollouts([Request(input={})])
    async with playing(flaky, waiting.agent):
        await asyncio.wait_for(waiting.begun.wait(), 5)
        flaky.refused = "heartbeat"
        while "heartbeat of runner w-1 failed" not in caplog.text:
            await asyncio.sleep(0.001)
        flaky.refused = ""
        await flaky.update_rollout(rollout.rollout_id, status="cancelled")
        await asyncio.wait_for(waiting.cancelled.wait(), 5)


async def test_a_store_that_refuses_leases_ends_the_runner_with_its_error(flaky: Flaky) -> None:
    flaky.refused = "dequeue_many_rollouts"
    with pytest.raises(lr.StoreError, match="dequeue_many_rollouts is refused"):
        await asyncio.wait_for(Runner(agent_of(lambda: 1.0, True), flaky, "w-1", SECRET).run(), 5)


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
