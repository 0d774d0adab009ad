"""What travels to the store's actor, and in which messages: a road without Ray, and the codec."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store import StoreClient, post
from lightning_ray.store.wire import decode, encode, outcome_of, raise_outcome
from lightning_ray.types import (
    LLM,
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    PaginatedResult,
    PromptTemplate,
    ProxyLLM,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    Worker,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 5), inner),
    max_leaves=20,
)


# --- the codec ------------------------------------------------------------------------------------------------


@given(PLAIN)
def test_plain_data_arrives_as_it_was(value: Any) -> None:
    assert decode(*encode(value, "it")) == value


def test_the_types_of_the_store_arrive_as_themselves() -> None:
    attempt = Attempt(rollout_id="r", attempt_id="a", sequence_id=1, start_time=0.5, metadata={"x": [1]})
    rollout = Rollout(rollout_id="r", input={"q": 1}, start_time=0.0, config=RolloutConfig(max_attempts=2))
    resources: Any = {
        "llm": LLM(endpoint="e", model="m"),
        "proxy": ProxyLLM(endpoint="e", model="m"),
        "p": PromptTemplate(template="t"),
    }
    update = ResourcesUpdate(resources_id="rs", create_time=1.0, update_time=2.0, resources=resources)
    value = [
        attempt,
        rollout,
        AttemptedRollout(**dict(rollout), attempt=attempt),
        update,
        Worker(worker_id="w", heartbeat_stats={"cpu": 1}),
        EnqueueRolloutRequest(input=1, config=RolloutConfig(timeout_seconds=1.0)),
        PaginatedResult(items=[rollout], total=5),
    ]
    found = decode(*encode(value, "it"))
    assert found == value
    assert [type(item) for item in found] == [type(item) for item in value]
    assert [type(item) for item in found[3].resources.values()] == [LLM, ProxyLLM, PromptTemplate]


def test_numbers_of_numpy_and_tuples_become_plain() -> None:
    value = {"a": np.float32(0.5), "b": np.arange(3), "c": (1, (2,))}
    assert decode(*encode(value, "it")) == {"a": 0.5, "b": [0, 1, 2], "c": [1, [2]]}


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_arrow_data_travels_beside_the_message(size: int) -> None:
    buffer, table = pa.py_buffer(b"x" * size), pa.table({"a": list(range(size // 10))})
    message, buffers = encode([buffer, {"t": table}], "it")
    assert len(message) < 40_000
    (found, tables) = decode(message, buffers)
    assert (found.to_pybytes(), tables["t"]) == (buffer.to_pybytes(), table)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ([("ro-1", "at-1", "failed", {"a": {"bad": object()}})], "call, ro-1, a, bad"),
        ([EnqueueRolloutRequest(input={"q": [2**70]}, rollout_id="ro-7")], "call, ro-7, input, q"),
        ({"text": "\ud800"}, "call, text"),
    ],
)
def test_what_cannot_be_sent_is_named(value: Any, where: str) -> None:
    with pytest.raises(StoreError, match=where):
        encode(value, "call")


def test_refusals_arrive_as_refusals() -> None:
    for error in (StoreError("no"), InfrastructureError("disk")):
        with pytest.raises(type(error), match=str(error)):
            raise_outcome(decode(*encode(outcome_of(error), "it")))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        raise_outcome(list(outcome_of(KeyError("x"))))


# --- the messages ---------------------------------------------------------------------------------------------


class Road:
    """Stands for an actor's handle: notes the messages, and lets each arrive when ``gate`` says so."""

    def __init__(self) -> None:
        self.messages: list[list[Any]] = []
        self.gate = asyncio.Semaphore(0)
        self.broken: Exception | None = None
        self.calls = self

    def remote(self, envelopes: list[Any], buffers: list[pa.Buffer]) -> Any:
        calls = [decode(message, buffers) for message, _, _ in envelopes]
        self.messages.append([args[0] for _, args in calls])
        return asyncio.ensure_future(self._arrive(calls))

    async def _arrive(self, calls: list[Any]) -> list[Any]:
        await self.gate.acquire()
        if self.broken is not None:
            raise self.broken
        return [
            encode([outcome_of(StoreError(f"no {args[0]}")), None] if name == "refuse" else [None, args[0]], "it")
            for name, args in calls
        ]

    def open(self, times: int = 1000) -> None:
        for _ in range(times):
            self.gate.release()


@pytest.fixture
def road() -> Road:
    pytest.importorskip("ray")
    return Road()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_comes_while_a_message_is_under_way_shares_the_next(road: Road) -> None:
    store = StoreClient(road)
    first = [asyncio.create_task(store._call("do", number)) for number in range(3)]
    await turns()
    later = [asyncio.create_task(store._call("do", number)) for number in range(3, 8)]
    await turns()
    road.open()
    assert await asyncio.gather(*first, *later) == list(range(8))
    assert road.messages == [[0, 1, 2], [3, 4, 5, 6, 7]]


async def test_each_call_has_its_own_refusal(road: Road) -> None:
    road.open()
    store = StoreClient(road)
    good, bad = await asyncio.gather(store._call("do", 1), store._call("refuse", 7), return_exceptions=True)
    assert good == 1
    assert isinstance(bad, StoreError) and "no 7" in str(bad)


async def test_messages_are_bounded(road: Road) -> None:
    road.open()
    store = StoreClient(road)
    await asyncio.gather(*(store._call("do", number) for number in range(300)))
    assert max(map(len, road.messages)) <= 128
    road.messages.clear()
    big = [pa.allocate_buffer(5 * 2**20) for _ in range(4)]
    await asyncio.gather(*(store._call("do", 1, buffer) for buffer in big))
    assert [len(message) for message in road.messages] == [2, 2]


async def test_calls_that_may_wait_go_apart_and_hold_up_no_one(road: Road) -> None:
    store = StoreClient(road)
    waiting = asyncio.create_task(store._call("wait", 1, timeout=30.0))
    await turns()
    quick = asyncio.create_task(store._call("do", 2))
    await turns()
    assert road.messages == [[1], [2]]
    road.open()
    assert await asyncio.gather(waiting, quick) == [1, 2]


async def test_a_slow_message_does_not_hold_up_later_ones(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "_SLOW_SECONDS", 0.01)
    store = StoreClient(road)
    calls = [asyncio.create_task(store._call("do", 1))]
    await turns()
    calls.append(asyncio.create_task(store._call("do", 2)))
    async with asyncio.timeout(10.0):
        while len(road.messages) < 2:
            await asyncio.sleep(0.001)
    road.open()
    assert await asyncio.gather(*calls) == [1, 2]


async def test_a_call_given_up_is_not_sent_and_one_that_waits_is_broken_off(
    road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off: list[Any] = []
    monkeypatch.setattr("ray.cancel", broken_off.append)
    store = StoreClient(road)
    waiting = asyncio.create_task(store._call("wait", 0, timeout=30.0))
    first = asyncio.create_task(store._call("do", 1))
    await turns()
    given_up, wanted = (asyncio.create_task(store._call("do", number)) for number in (2, 3))
    await turns()
    given_up.cancel()
    waiting.cancel()
    await turns()
    road.open()
    assert await asyncio.gather(first, wanted) == [1, 3]
    assert road.messages == [[0], [1], [3]]
    assert len(broken_off) == 1


async def test_what_is_queued_is_leased_at_once_and_only_an_empty_queue_is_waited_for(road: Road) -> None:
    store = StoreClient(road)
    road.open()
    assert await store._call("dequeue_many_rollouts", 3, timeout=30.0) == 3
    assert road.messages == [[3]]
    assert await store._call("dequeue_many_rollouts", 0, timeout=30.0) == 0
    assert road.messages == [[3], [0], [0]]


async def test_a_broken_road_is_told_at_the_deadline_and_mended_before_it(road: Road) -> None:
    from ray.exceptions import ActorUnavailableError

    road.open()
    road.broken = ActorUnavailableError("gone", None)
    with pytest.raises(InfrastructureError, match=r"cannot answer do \(deadline 0.1 s\).*gone"):
        await StoreClient(road, deadline=0.1)._call("do", 1)
    again = asyncio.create_task(StoreClient(road)._call("do", 2))
    await asyncio.sleep(0.1)
    road.broken = None
    assert await asyncio.wait_for(again, 10.0) == 2
