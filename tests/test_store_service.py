"""The store as concurrent callers see it: shared syncs, waits that do not poll, and a watchdog that goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store import LocalStoreClient, SpanStore, service
from lightning_ray.types import EnqueueRolloutRequest, RolloutConfig
from tests.test_store_contract import finish, leased, pair, spans


class Clock:
    """A time that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LocalStoreClient]:
    monkeypatch.setattr(service, "WATCH_SECONDS", 0.01)
    client = LocalStoreClient(SpanStore(tmp_path, clock, lease_seconds=60.0, retention_seconds=1000.0))
    yield client
    await client.close()


async def ticks(store: LocalStoreClient, count: int = 2) -> None:
    """Let the watchdog have some turns."""
    core = store._service.store
    done, tick = asyncio.Event(), core.tick
    left = count

    def counted() -> None:
        nonlocal left
        tick()
        left -= 1
        if left <= 0:
            done.set()

    core.tick = counted  # type: ignore[method-assign]
    await asyncio.wait_for(done.wait(), 10.0)
    core.tick = tick  # type: ignore[method-assign]


async def status(store: LocalStoreClient, rollout_id: str) -> str | None:
    rollout = await store.get_rollout_by_id(rollout_id)
    return None if rollout is None else rollout.status


# --- time -----------------------------------------------------------------------------------------------------


async def test_a_claim_that_is_never_started_comes_back_by_itself(store: LocalStoreClient, clock: Clock) -> None:
    (claim,) = await leased(store)
    waiting = asyncio.create_task(store.dequeue_rollout("another", timeout=30.0))
    clock.now += 60.0
    await ticks(store)
    assert not waiting.done()
    clock.now += 0.1
    again = await asyncio.wait_for(waiting, 10.0)
    assert again is not None and (again.rollout_id, again.attempt.sequence_id) == (claim.rollout_id, 2)


async def test_signs_of_life_of_all_kinds_keep_a_lease(store: LocalStoreClient, clock: Clock) -> None:
    claims = await leased(store, 5, config=RolloutConfig(unresponsive_seconds=50.0))
    for _ in range(3):
        clock.now += 40.0
        assert await store.heartbeat("worker", [pair(claims[0])]) == []
        await store.append_spans(spans(claims[1], first=int(clock.now)))
        await store.update_attempt(*pair(claims[2]), last_heartbeat_time=clock.now)
        await ticks(store)
    statuses = [(await store.get_latest_attempt(claim.rollout_id)).status for claim in claims]  # type: ignore[union-attr]
    assert statuses == ["preparing", "running", "preparing", "unresponsive", "unresponsive"]
    clock.now += 40.0
    await store.update_worker("worker")
    clock.now += 40.0
    await ticks(store)
    assert [await status(store, claim.rollout_id) for claim in claims] == [
        "preparing",
        "running",
        "preparing",
        "failed",
        "failed",
    ]


async def test_attempts_started_without_a_worker_are_not_leased(store: LocalStoreClient, clock: Clock) -> None:
    free = await store.start_rollout(1)
    bound = await store.start_rollout(2, worker_id="w")
    limited = await store.start_rollout(3, config=RolloutConfig(unresponsive_seconds=300.0))
    clock.now += 299.0
    await ticks(store)
    assert [await status(store, one.rollout_id) for one in (free, bound, limited)] == [
        "preparing",
        "requeuing",
        "preparing",
    ]
    clock.now += 2.0
    await ticks(store)
    assert await status(store, limited.rollout_id) == "failed"


async def test_old_rollouts_are_deleted(store: LocalStoreClient, clock: Clock) -> None:
    ended, live, later = await leased(store, 3)
    await finish(store, ended, spans=spans(ended))
    clock.now += 500.0
    await store.update_worker("worker")
    await finish(store, later)
    for _ in range(10):
        clock.now += 50.1
        await store.update_worker("worker")
    await ticks(store)
    assert await status(store, ended.rollout_id) is None
    assert (await status(store, live.rollout_id), await status(store, later.rollout_id)) == ("preparing", "succeeded")
    assert (await store.statistics())["spans"] == 0


async def test_retention_counts_what_had_ended_before_opening(tmp_path: Path, clock: Clock) -> None:
    store = LocalStoreClient(SpanStore(tmp_path, clock))
    (claim,) = await leased(store)
    await finish(store, claim)
    await store.close()
    core = SpanStore(tmp_path, clock, retention_seconds=10.0)
    clock.now += 10.0
    core.tick()
    assert core.get_rollout_by_id(claim.rollout_id) is not None
    clock.now += 0.1
    core.tick()
    assert core.get_rollout_by_id(claim.rollout_id) is None
    core.close()
    assert SpanStore(tmp_path).statistics()["rollouts"] == 0


async def test_the_watchdog_survives_failures(
    store: LocalStoreClient, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = store._service.store
    failures = {"tick": 2, "maintain": 2}
    maintained = asyncio.Event()

    def failing(name: str, real: Any) -> Any:
        def call() -> None:
            if failures[name]:
                failures[name] -= 1
                raise RuntimeError(f"{name} broke")
            real()
            if name == "maintain":
                maintained.set()

        return call

    (claim,) = await leased(store, config=RolloutConfig(timeout_seconds=5.0))
    with caplog.at_level(logging.ERROR):
        for name in failures:
            monkeypatch.setattr(core, name, failing(name, getattr(core, name)))
        clock.now += 6.0
        (rollout,) = await store.wait_for_rollouts(rollout_ids=[claim.rollout_id], timeout=10.0)
        await asyncio.wait_for(maintained.wait(), 10.0)
    assert rollout.status == "failed"
    assert "tick broke" in caplog.text and "maintain broke" in caplog.text


async def test_the_watchdog_begins_without_any_call(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = SpanStore(tmp_path, clock)
    core.enqueue_many_rollouts([EnqueueRolloutRequest(input=1, rollout_id="ro-1")])
    core.dequeue_many_rollouts(1, "w")
    core.close()
    monkeypatch.setattr(service, "WATCH_SECONDS", 0.01)
    opened = SpanStore(tmp_path, clock)
    client = LocalStoreClient(opened)
    clock.now += 61.0
    async with asyncio.timeout(10.0):
        while not opened.queued:
            await asyncio.sleep(0.01)
    await client.close()


# --- waiting --------------------------------------------------------------------------------------------------


async def test_waiting_does_not_poll(store: LocalStoreClient) -> None:
    core = store._service.store
    asked, dequeue = [], core.dequeue_many_rollouts

    def counted(*args: Any) -> Any:
        asked.append(args)
        return dequeue(*args)

    core.dequeue_many_rollouts = counted  # type: ignore[method-assign]
    waiting = asyncio.create_task(store.dequeue_rollout("w", timeout=30.0))
    await ticks(store, 10)
    assert len(asked) == 1
    await store.enqueue_rollout(1)
    assert await asyncio.wait_for(waiting, 10.0) is not None
    assert len(asked) == 2


async def test_a_wait_for_the_queue_claims_nothing(store: LocalStoreClient) -> None:
    assert await store._call("wait_for_queue", timeout=0.01) is False
    waiting = asyncio.create_task(store._call("wait_for_queue", timeout=30.0))
    await asyncio.sleep(0.01)
    await store.enqueue_rollout(1)
    assert await asyncio.wait_for(waiting, 10.0) is True
    assert await store._call("wait_for_queue", timeout=0.0) is True
    assert (await store.statistics())["queued"] == 1


async def test_a_dequeue_given_up_passes_its_turn_on(store: LocalStoreClient) -> None:
    first = asyncio.create_task(store.dequeue_rollout("w1", timeout=30.0))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(store.dequeue_rollout("w2", timeout=30.0))
    await asyncio.sleep(0.05)
    enqueued = asyncio.create_task(store.enqueue_rollout(1))
    await asyncio.sleep(0)
    first.cancel()
    await enqueued
    claims = await asyncio.gather(first, asyncio.wait_for(second, 10.0), return_exceptions=True)
    assert sum(claim is not None and not isinstance(claim, BaseException) for claim in claims) == 1


async def test_a_resent_request_whose_claims_have_ended_is_answered_at_once(store: LocalStoreClient) -> None:
    await store.enqueue_rollout(1)
    claim = await store.dequeue_rollout("w", request_id="rq-1")
    assert claim is not None
    await finish(store, claim)
    await store.enqueue_rollout(2)
    assert await asyncio.wait_for(store.dequeue_rollout("w", request_id="rq-1", timeout=30.0), 10.0) is None


async def test_deleting_ends_a_wait(store: LocalStoreClient) -> None:
    kept, gone = await leased(store, 2)
    waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[kept.rollout_id, gone.rollout_id], timeout=30.0))
    await asyncio.sleep(0.01)
    await finish(store, kept)
    await store.delete_rollouts([gone.rollout_id])
    assert [rollout.rollout_id for rollout in await asyncio.wait_for(waiting, 10.0)] == [kept.rollout_id]
    with pytest.raises(StoreError, match=gone.rollout_id):
        await store.wait_for_rollouts(rollout_ids=[gone.rollout_id])


# --- the disk -------------------------------------------------------------------------------------------------


async def test_answers_wait_for_the_disk_and_share_its_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate, syncs = LocalStoreClient(SpanStore(tmp_path)), threading.Event(), []

    def slow(fd: int) -> None:
        syncs.append(fd)
        gate.wait(10.0)

    monkeypatch.setattr("os.fdatasync", slow)
    writes = [asyncio.create_task(store.enqueue_rollout(number)) for number in range(50)]
    read = asyncio.create_task(store.query_rollouts())
    done, _ = await asyncio.wait([*writes, read], timeout=0.3)
    assert not done
    gate.set()
    await asyncio.wait_for(asyncio.gather(*writes, read), 5.0)
    assert len(syncs) <= 3
    await store.close()


async def test_spans_that_need_not_be_synced_are_before_anything_is_told_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStoreClient(SpanStore(tmp_path))
    first, second = await leased(store, 2)
    gate = threading.Event()
    monkeypatch.setattr("os.fdatasync", lambda fd: gate.wait(10.0))
    left_out = await asyncio.wait_for(store.append_spans(spans(first, 2), synced=False), 5.0)
    assert left_out == []
    end = asyncio.create_task(store.finish_attempt(*pair(first), "succeeded"))
    read = asyncio.create_task(store.scan_spans([first.rollout_id]))
    other = asyncio.create_task(store.append_spans(spans(second, 1)))
    done, _ = await asyncio.wait([end, read, other], timeout=0.3)
    assert not done
    gate.set()
    assert (await asyncio.wait_for(read, 5.0)).num_rows == 2
    await asyncio.wait_for(asyncio.gather(end, other), 5.0)
    await store.close()


async def test_spans_that_need_not_be_synced_are_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, synced = LocalStoreClient(SpanStore(tmp_path)), threading.Event()
    (claim,) = await leased(store)
    monkeypatch.setattr("os.fdatasync", lambda fd: synced.set())
    await store.append_spans(spans(claim, 1), synced=False)
    assert await asyncio.to_thread(synced.wait, 10.0)
    await store.close()


async def test_a_failing_disk_is_told_after_a_sync_that_nobody_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStoreClient(SpanStore(tmp_path))
    (claim,) = await leased(store)

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fdatasync", broken)
    await store.append_spans(spans(claim, 1), synced=False)
    async with asyncio.timeout(10.0):
        while "watchdog failed" not in caplog.text:
            await asyncio.sleep(0.01)
    with pytest.raises(InfrastructureError, match="Input/output error"):
        await store.append_spans(spans(claim, 1, first=1), synced=False)


async def test_a_failing_disk_is_told_to_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStoreClient(SpanStore(tmp_path))

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fdatasync", broken)
    answers = await asyncio.gather(*(store.enqueue_rollout(number) for number in range(3)), return_exceptions=True)
    assert all(isinstance(answer, InfrastructureError) for answer in answers)
    with pytest.raises(InfrastructureError, match="Input/output error"):
        await store.query_rollouts()


async def test_numbers_never_come_twice_after_a_restart(tmp_path: Path) -> None:
    store = LocalStoreClient(SpanStore(tmp_path))
    (claim,) = await leased(store)
    given = [await store.get_next_span_sequence_id(*pair(claim)) for _ in range(3)]
    await store.append_spans(spans(claim, 2))
    await store.close()
    store = LocalStoreClient(SpanStore(tmp_path))
    stored = (await store.scan_spans([claim.rollout_id]))["sequence_id"].to_pylist()
    later = [await store.get_next_span_sequence_id(*pair(claim)) for _ in range(3)]
    assert (given, stored) == ([1, 2, 3], [4, 5])
    assert later == list(range(later[0], later[0] + 3)) and later[0] > 5
    await store.close()
