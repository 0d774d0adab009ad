"""The store's contract as its clients see it, against every implementation of ``store_stores``."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pyarrow as pa
import pytest

from lightning_ray.errors import StoreError
from lightning_ray.store import SPAN_SCHEMA, Finish, Store, read_spans, spans_to_batch
from lightning_ray.types import (
    LLM,
    AttemptedRollout,
    EnqueueRolloutRequest,
    PromptTemplate,
    RolloutConfig,
    Span,
)

pytest_plugins = "tests.store_stores"

RETRY = RolloutConfig(max_attempts=2, retry_condition=["failed", "timeout"])


def fresh(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def span(claim: AttemptedRollout, number: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "rollout_id": claim.rollout_id,
        "attempt_id": claim.attempt.attempt_id,
        "sequence_id": 0,
        "trace_id": "t",
        "span_id": f"s{number}",
        "name": "openai.chat.completion",
        **fields,
    }


def spans(claim: AttemptedRollout, count: int = 1, first: int = 0, **fields: Any) -> pa.RecordBatch:
    tokens = {"prompt_ids": list(range(600)), "sampled_ids": [1] * 150}
    return spans_to_batch(span(claim, number, **tokens, **fields) for number in range(first, first + count))


async def leased(store: Store, count: int = 1, worker_id: str = "worker", **request: Any) -> list[AttemptedRollout]:
    await store.enqueue_many_rollouts([EnqueueRolloutRequest(input={"q": n}, **request) for n in range(count)])
    return await store.dequeue_many_rollouts(limit=count, worker_id=worker_id)


async def finish(store: Store, claim: AttemptedRollout, status: str = "succeeded", **more: Any) -> Any:
    return await store.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, status, **more)


def pair(claim: AttemptedRollout) -> tuple[str, str]:
    return claim.rollout_id, claim.attempt.attempt_id


# --- the way of a rollout -------------------------------------------------------------------------------------


async def test_a_rollouts_way(store: Store) -> None:
    queued = await store.enqueue_rollout({"q": (1, 2)}, mode="train", metadata={"task": 7})
    assert (queued.status, queued.mode, queued.metadata, queued.end_time) == ("queuing", "train", {"task": 7}, None)
    claim = await store.dequeue_rollout("w-1")
    assert claim is not None
    assert (claim.rollout_id, claim.input, claim.mode) == (queued.rollout_id, {"q": [1, 2]}, "train")
    assert (claim.status, claim.attempt.worker_id, claim.attempt.sequence_id) == ("preparing", "w-1", 1)
    assert await store.dequeue_rollout("w-1") is None
    assert await store.append_spans(spans(claim)) == []
    assert [rollout.rollout_id for rollout in await store.query_rollouts(status_in=["running"])] == [claim.rollout_id]
    rollout = await finish(store, claim, spans=spans(claim, first=1, reward=0.5), metadata={"seconds": 1.5})
    assert (rollout.status, rollout.end_time is not None) == ("succeeded", True)
    (attempt,) = await store.query_attempts(claim.rollout_id)
    assert (attempt.status, attempt.metadata) == ("succeeded", {"seconds": 1.5})
    assert attempt.end_time == rollout.end_time
    table = await store.scan_spans([claim.rollout_id])
    assert table["sampled_ids"].to_pylist() == [[1] * 150] * 2
    assert table["reward"].to_pylist() == [None, 0.5]
    assert [found.span_id for found in read_spans(table)] == ["s0", "s1"]


async def test_the_queue_is_first_in_first_out(store: Store) -> None:
    ids = [(await store.enqueue_rollout(n)).rollout_id for n in range(3)]
    found = [await store.dequeue_rollout("w") for _ in ids]
    if len(ids) == len(set(ids)) and not is_sharded(store):
        assert [claim.rollout_id for claim in found if claim] == ids
    assert {claim.rollout_id for claim in found if claim} == set(ids)


def is_sharded(store: Store) -> bool:
    """FIFO holds within a shard only."""
    return hasattr(store, "shards")


async def test_resent_calls_count_once(store: Store) -> None:
    request = EnqueueRolloutRequest(rollout_id=fresh("ro"), input=1)
    for _ in range(2):
        await store.enqueue_many_rollouts([request, request])
    request_id = fresh("rq")
    claims = await store.dequeue_many_rollouts(worker_id="w", request_id=request_id)
    assert await store.dequeue_many_rollouts(worker_id="w", request_id=request_id) == claims
    assert await store.dequeue_many_rollouts(worker_id="w") == []
    for _ in range(2):
        await store.append_spans(spans(claims[0], 3))
        assert await store.append_spans(spans(claims[0], 3, first=1)) in ([0, 1], [0, 1, 2])
    for _ in range(2):
        rollout = await finish(store, claims[0], spans=spans(claims[0], 2, first=4))
    assert await store.append_spans(spans(claims[0], 7)) == [0, 1, 2, 3, 4, 5]
    (found,) = await store.query_rollouts(rollout_id_in=[claims[0].rollout_id])
    assert (found.status, found.end_time) == (rollout.status, rollout.end_time)
    table = await store.scan_spans([claims[0].rollout_id])
    assert table["span_id"].to_pylist() == [f"s{number}" for number in range(7)]
    assert table["sequence_id"].to_pylist() == list(range(1, 8))
    assert len(await store.query_attempts(claims[0].rollout_id)) == 1
    assert await store.dequeue_many_rollouts(worker_id="w", request_id=request_id) == []


async def test_retries_and_late_results(store: Store) -> None:
    (first,) = await leased(store, config=RETRY)
    assert (await finish(store, first, "failed", metadata={"reason": "bug"})).status == "requeuing"
    (second,) = await store.dequeue_many_rollouts(worker_id="w")
    assert (second.rollout_id, second.attempt.sequence_id) == (first.rollout_id, 2)
    assert (await finish(store, first, spans=spans(first))).status == "preparing"
    rollout = await finish(store, second, "failed", metadata={"reason": "bug"})
    assert (rollout.status, rollout.metadata) == ("failed", {"failure": {"kind": "failed", "reason": "bug"}})
    assert (await store.scan_spans([first.rollout_id]))["attempt_id"].to_pylist() == [first.attempt.attempt_id]
    assert [attempt.status for attempt in await store.query_attempts(first.rollout_id)] == ["failed", "failed"]


async def test_the_infrastructures_failures_do_not_count(store: Store) -> None:
    (claim,) = await leased(store)
    told = {"infrastructure": True, "reason": "endpoint gone"}
    assert (await finish(store, claim, "failed", metadata=told)).status == "requeuing"
    (again,) = await store.dequeue_many_rollouts(worker_id="w")
    assert await store.release_worker("w", "killed") == [claim.rollout_id]
    (again,) = await store.dequeue_many_rollouts(worker_id="w2")
    assert again.attempt.sequence_id == 3
    assert (await finish(store, again)).status == "succeeded"


async def test_finishing_many_is_all_or_nothing(store: Store) -> None:
    claims = await leased(store, 3)
    ends = [Finish(*pair(claim), "succeeded") for claim in claims]
    bad = Finish(claims[0].rollout_id, "at-ghost", "succeeded")
    with pytest.raises(StoreError, match="at-ghost"):
        await store.finish_many_attempts([ends[0], bad], spans(claims[0]))
    with pytest.raises(StoreError, match="'running'"):
        await store.finish_many_attempts([Finish(*pair(claims[0]), "running")])
    with pytest.raises(StoreError, match=claims[0].rollout_id):
        await store.finish_many_attempts([Finish(*pair(claims[0]), "succeeded", {"bad": object()})])
    assert (await store.scan_spans([claims[0].rollout_id])).num_rows == 0
    batch = spans_to_batch([span(claim) for claim in claims])
    ended = await store.finish_many_attempts(ends, batch)
    assert [(rollout.rollout_id, rollout.status) for rollout in ended] == [
        (claim.rollout_id, "succeeded") for claim in claims
    ]
    assert (await store.scan_spans([claim.rollout_id for claim in claims])).num_rows == 3


# --- start: past the queue ------------------------------------------------------------------------------------


async def test_start_rollout_needs_no_queue(store: Store) -> None:
    started = await store.start_rollout({"q": 1}, mode="val", worker_id="w-start", metadata={"a": 1})
    assert (started.status, started.attempt.status, started.attempt.worker_id) == ("preparing", "preparing", "w-start")
    assert (started.mode, started.metadata) == ("val", {"a": 1})
    assert await store.dequeue_rollout("w") is None
    assert await store.heartbeat("w-start", [pair(started)]) == []
    await store.add_span(Span(**span(started)))
    assert (await store.get_rollout_by_id(started.rollout_id)).status == "running"  # type: ignore[union-attr]
    assert (await finish(store, started)).status == "succeeded"
    with pytest.raises(StoreError, match="rs-ghost"):
        await store.start_rollout(1, resources_id="rs-ghost")


async def test_starting_again_is_answered_as_it_stands(store: Store) -> None:
    request = EnqueueRolloutRequest(rollout_id=fresh("ro"), input=1)
    first = await store._call("start_rollout", request, "at-1", None)
    assert await store._call("start_rollout", request, "at-1", None) == first
    second = await store.start_attempt(first.rollout_id, attempt_id="at-2")
    assert await store.start_attempt(first.rollout_id, attempt_id="at-2") == second
    assert await store._call("start_rollout", request, "at-1", None) == second.model_copy(
        update={"attempt": (await store.query_attempts(first.rollout_id))[0]}
    )
    assert len(await store.query_attempts(first.rollout_id)) == 2


async def test_a_further_attempt_supersedes_the_one_at_work_and_does_not_count(store: Store) -> None:
    (claim,) = await leased(store, config=RETRY)
    second = await store.start_attempt(claim.rollout_id)
    first, _ = await store.query_attempts(claim.rollout_id)
    assert (first.status, first.end_time is not None) == ("failed", True)
    assert first.metadata == {"reason": f"superseded by attempt {second.attempt.attempt_id}"}
    assert (second.attempt.sequence_id, second.attempt.worker_id) == (2, None)
    assert await store.heartbeat("worker", [pair(claim)]) == [pair(claim)]
    assert await store.dequeue_rollout("w") is None
    assert (await finish(store, second, "failed")).status == "requeuing"
    third = await store.start_attempt(claim.rollout_id, worker_id="w")
    assert (await finish(store, third, "failed")).status == "failed"
    with pytest.raises(StoreError, match=r"has ended \(failed\)"):
        await store.start_attempt(claim.rollout_id)
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.start_attempt("ro-ghost")


# --- update ---------------------------------------------------------------------------------------------------


async def test_cancelling_reaches_the_worker(store: Store) -> None:
    claims = await leased(store, 2)
    held = [pair(claim) for claim in claims]
    assert await store.heartbeat("worker", held) == []
    cancelled = await store.update_rollout(claims[0].rollout_id, status="cancelled")
    assert (cancelled.status, cancelled.end_time is not None) == ("cancelled", True)
    attempt = await store.get_latest_attempt(claims[0].rollout_id)
    assert attempt is not None
    assert (attempt.status, attempt.end_time, attempt.metadata) == (
        "failed",
        cancelled.end_time,
        {"reason": "cancelled"},
    )
    assert await store.heartbeat("worker", held) == held[:1]
    assert (await finish(store, claims[0])).status == "cancelled"
    assert (await store.update_rollout(claims[0].rollout_id, status="queuing")).status == "cancelled"
    assert await store.heartbeat("another", held[1:]) == held[1:]


async def test_updating_a_rollouts_fields(store: Store) -> None:
    update = await store.add_resources({"p": PromptTemplate(template="{x}")})
    rollout = await store.enqueue_rollout(1, mode="train", metadata={"a": 1})
    changed = await store.update_rollout(
        rollout.rollout_id, input=[2], mode=None, config=RETRY, metadata=None, resources_id=update.resources_id
    )
    assert (changed.input, changed.mode, changed.config, changed.metadata) == ([2], None, RETRY, None)
    assert (changed.resources_id, changed.status) == (update.resources_id, "queuing")
    claim = await store.dequeue_rollout("w")
    assert claim is not None
    assert (claim.input, claim.config) == ([2], RETRY)
    assert (await store.update_rollout(rollout.rollout_id, resources_id=None)).resources_id is None
    await finish(store, claim)
    assert (await store.update_rollout(rollout.rollout_id, metadata={"b": 2})).metadata == {"b": 2}
    for refused in ({"resources_id": "rs-ghost"}, {"mode": "fly"}, {"status": "done"}, {"metadata": 5}):
        with pytest.raises(StoreError, match=next(iter(refused.values())) if "metadata" not in refused else "metadata"):  # type: ignore[call-overload]
            await store.update_rollout(rollout.rollout_id, **refused)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.update_rollout("ro-ghost", metadata={})


async def test_setting_a_rollouts_status(store: Store) -> None:
    claims = await leased(store, 3)
    a, b, c = [claim.rollout_id for claim in claims]
    for status in ("queuing", "requeuing", "requeuing"):
        assert (await store.update_rollout(a, status=status)).status == status
    again = await store.dequeue_many_rollouts(limit=5, worker_id="w")
    assert [(claim.rollout_id, claim.attempt.sequence_id) for claim in again] == [(a, 2)]
    assert (await store.update_rollout(b, status="succeeded")).end_time is not None
    assert [attempt.status for attempt in await store.query_attempts(b)] == ["succeeded"]
    assert (await store.update_rollout(c, status="running")).status == "running"
    assert [attempt.status for attempt in await store.query_attempts(c)] == ["running"]
    assert (await store.update_rollout(c, status="failed")).status == "failed"
    queued = await store.enqueue_rollout(1)
    with pytest.raises(StoreError, match="no attempt at work"):
        await store.update_rollout(queued.rollout_id, status="running")


async def test_updating_an_attempt(store: Store) -> None:
    (claim,) = await leased(store, config=RETRY)
    updated = await store.update_attempt(
        claim.rollout_id, "latest", status="running", worker_id="other", metadata={"a": 1}, last_heartbeat_time=5.0
    )
    assert (updated.attempt_id, updated.status, updated.worker_id) == (claim.attempt.attempt_id, "running", "other")
    assert (updated.metadata, updated.last_heartbeat_time) == ({"a": 1}, 5.0)
    assert (await store.get_rollout_by_id(claim.rollout_id)).status == "running"  # type: ignore[union-attr]
    assert await store.heartbeat("other", [pair(claim)]) == []
    ended = await store.update_attempt(*pair(claim), status="timeout", metadata={"b": 2})
    assert (ended.status, ended.metadata, ended.end_time is not None) == ("timeout", {"b": 2}, True)
    assert (await store.get_rollout_by_id(claim.rollout_id)).status == "requeuing"  # type: ignore[union-attr]
    late = await store.update_attempt(*pair(claim), status="succeeded", metadata=None)
    assert (late.status, late.metadata) == ("timeout", None)
    assert (await store.get_rollout_by_id(claim.rollout_id)).status == "requeuing"  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="at-ghost"):
        await store.update_attempt(claim.rollout_id, "at-ghost", status="failed")
    with pytest.raises(StoreError, match="'done'"):
        await store.update_attempt(*pair(claim), status="done")  # type: ignore[arg-type]
    queued = await store.enqueue_rollout(1)
    with pytest.raises(StoreError, match="no attempt 'latest'"):
        await store.update_attempt(queued.rollout_id, "latest", status="failed")


async def test_deleting(store: Store) -> None:
    claims = await leased(store, 3)
    ids = [claim.rollout_id for claim in claims]
    await finish(store, claims[0], spans=spans(claims[0], 2))
    await finish(store, claims[2], spans=spans(claims[2], 2))
    queued = await store.enqueue_rollout(1)
    before = await store.statistics()
    gone = [ids[0], ids[1], queued.rollout_id]
    assert sorted(await store.delete_rollouts([*gone, "ro-ghost"])) == sorted(gone)
    after = await store.statistics()
    assert before["total_spans"] - after["total_spans"] == 2
    assert before["total_rollouts"] - after["total_rollouts"] == 3
    assert before["total_attempts"] - after["total_attempts"] == 2
    assert await store.heartbeat("worker", [pair(claims[1])]) == [pair(claims[1])]
    assert await store.dequeue_rollout("w") is None
    assert await store.get_rollout_by_id(ids[0]) is None
    with pytest.raises(StoreError, match=ids[0]):
        await store.scan_spans(ids)
    with pytest.raises(StoreError, match=ids[1]):
        await finish(store, claims[1])
    assert (await store.scan_spans(ids[2:])).num_rows == 2
    assert await store.delete_rollouts(gone) == []
    again = await store.start_rollout("new", rollout_id=ids[0])
    assert (await store.scan_spans([ids[0]])).num_rows == 0
    assert again.input == "new"


# --- workers --------------------------------------------------------------------------------------------------


async def test_workers(store: Store) -> None:
    worker_id = fresh("worker")
    assert await store.get_worker_by_id(worker_id) is None
    met = await store.update_worker(worker_id)
    assert (met.status, met.heartbeat_stats, met.last_heartbeat_time is not None) == ("unknown", None, True)
    told = await store.update_worker(worker_id, {"cpu": 0.5})
    assert told.heartbeat_stats == {"cpu": 0.5}
    (claim,) = await leased(store, worker_id=worker_id)
    busy = await store.get_worker_by_id(worker_id)
    assert busy is not None and busy.last_busy_time is not None and busy.last_dequeue_time is not None
    assert (busy.status, busy.current_rollout_id, busy.current_attempt_id) == ("busy", *pair(claim))
    assert (await store.update_worker(worker_id)).heartbeat_stats == {"cpu": 0.5}
    await finish(store, claim)
    idle = await store.get_worker_by_id(worker_id)
    assert idle is not None and idle.last_idle_time is not None
    assert (idle.status, idle.current_rollout_id, idle.current_attempt_id) == ("idle", None, None)
    (claim,) = await leased(store, worker_id=worker_id)
    await finish(store, claim, "timeout")
    assert (await store.get_worker_by_id(worker_id)).status == "unknown"  # type: ignore[union-attr]


async def test_querying_workers(store: Store) -> None:
    mark = fresh("m")
    for number in range(3):
        await store.heartbeat(f"{mark}-{number}", [])
    found = await store.query_workers(worker_id_contains=mark, sort_by="worker_id", sort_order="desc", limit=2)
    assert [worker.worker_id for worker in found] == [f"{mark}-2", f"{mark}-1"]
    assert (found.total, found.limit, found.offset) == (3, 2, 0)
    both = await store.query_workers(worker_id_contains=mark, status_in=["busy"])
    assert (list(both), both.total) == ([], 0)
    either = await store.query_workers(worker_id_contains=mark, status_in=["busy"], filter_logic="or")
    assert {f"{mark}-{number}" for number in range(3)} <= {worker.worker_id for worker in either}


async def test_a_released_worker_gets_nothing_any_more(store: Store) -> None:
    dead, alive = fresh("dead"), fresh("alive")
    waiting = asyncio.create_task(store.dequeue_many_rollouts(worker_id=dead, timeout=30.0))
    await seen(store, dead)
    other = asyncio.create_task(store.dequeue_many_rollouts(worker_id=alive, timeout=30.0))
    await seen(store, alive)
    await asyncio.gather(store.release_worker(dead, "killed"), store.enqueue_rollout(1))
    assert len(await asyncio.wait_for(other, 10.0)) == 1
    assert await asyncio.wait_for(waiting, 10.0) == []


async def seen(store: Store, worker_id: str) -> None:
    """Wait until the store has heard of the worker: its dequeue waits."""
    async with asyncio.timeout(10.0):
        while await store.get_worker_by_id(worker_id) is None:
            await asyncio.sleep(0.01)


# --- waiting --------------------------------------------------------------------------------------------------


async def test_a_dequeue_waits_for_work_and_no_longer(store: Store) -> None:
    assert await store.dequeue_many_rollouts(worker_id="w", timeout=0.05) == []
    waiting = [asyncio.create_task(store.dequeue_many_rollouts(worker_id=fresh("w"), timeout=30.0)) for _ in range(4)]
    await asyncio.sleep(0.2)
    await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=n) for n in range(3)])
    claims = []
    for task in waiting:
        task.add_done_callback(lambda task: claims.extend([] if task.cancelled() else task.result()))
    async with asyncio.timeout(10.0):
        while len(claims) < 3:
            await asyncio.sleep(0.01)
    assert len({claim.rollout_id for claim in claims}) == 3
    await store.release_worker(claims[0].attempt.worker_id or "", "killed")
    async with asyncio.timeout(10.0):
        while len(claims) < 4:
            await asyncio.sleep(0.01)
    assert claims[3].rollout_id == claims[0].rollout_id


async def test_waiting_for_rollouts(store: Store) -> None:
    claims = await leased(store, 3)
    ids = [claim.rollout_id for claim in claims]
    await finish(store, claims[0], "failed")
    assert [rollout.rollout_id for rollout in await store.wait_for_rollouts(rollout_ids=ids, timeout=0.05)] == ids[:1]
    waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=ids))
    await finish(store, claims[1])
    await store.update_rollout(ids[2], status="cancelled")
    rollouts = await asyncio.wait_for(waiting, 10.0)
    assert {rollout.rollout_id: rollout.status for rollout in rollouts} == dict(
        zip(ids, ["failed", "succeeded", "cancelled"], strict=True)
    )
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.wait_for_rollouts(rollout_ids=["ro-ghost"], timeout=1.0)


async def test_the_watchdog_needs_no_calls(store: Store) -> None:
    started = await store.start_rollout(1, config=RolloutConfig(timeout_seconds=0.2))
    (rollout,) = await store.wait_for_rollouts(rollout_ids=[started.rollout_id], timeout=20.0)
    assert (rollout.metadata or {})["failure"]["kind"] == "timeout"
    (attempt,) = await store.query_attempts(started.rollout_id)
    assert (attempt.status, attempt.end_time is not None) == ("timeout", True)


# --- spans ----------------------------------------------------------------------------------------------------


async def test_spans_as_objects(store: Store) -> None:
    (claim,) = await leased(store)
    first = Span(**span(claim, 0, attributes={"a": 1}, start_time=1.0, end_time=2.0))
    second = Span(**span(claim, 1))
    assert await store.add_span(first) == first
    assert await store.add_span(first) is None
    assert await store.add_many_spans([first, second]) == [second]
    assert await store.add_many_spans([]) == []
    found = await store.query_spans(claim.rollout_id)
    assert [(one.span_id, one.sequence_id) for one in found] == [("s0", 1), ("s1", 2)]
    assert (found[0].attributes, found[0].start_time, found[0].status.status_code) == ({"a": 1}, 1.0, "UNSET")


async def test_spans_of_opentelemetry(store: Store) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    (claim,) = await leased(store)
    with sdk.TracerProvider().get_tracer("test").start_as_current_span("call", attributes={"a": 1}) as made:
        made.add_event("token", {"n": 1})
    first = await store.add_otel_span(*pair(claim), made)
    assert first is not None and (first.sequence_id, first.name, first.attributes) == (1, "call", {"a": 1})
    assert await store.add_otel_span(*pair(claim), made) is None
    (found,) = await store.query_spans(claim.rollout_id)
    assert (found.span_id, found.attributes, found.events[0].name) == (first.span_id, {"a": 1}, "token")


async def test_sequence_numbers(store: Store) -> None:
    first, other = await leased(store, 2, config=RETRY)
    assert [await store.get_next_span_sequence_id(*pair(first)) for _ in range(3)] == [1, 2, 3]
    assert await store.get_many_span_sequence_ids([pair(first), pair(other), pair(first)]) == [4, 1, 5]
    await store.append_spans(spans_to_batch([span(first, 0), span(first, 1, sequence_id=9), span(first, 2)]))
    assert await store.get_next_span_sequence_id(*pair(first)) > 9
    stored = (await store.scan_spans([first.rollout_id]))["sequence_id"].to_pylist()
    assert stored[1] == 9 and len({*stored, *range(1, 6)}) == 8
    many = await store.get_many_span_sequence_ids([pair(other)] * 200)
    assert many == list(range(2, 202))
    await finish(store, other, "failed")
    (retry,) = await store.dequeue_many_rollouts(worker_id="w")
    assert await store.get_next_span_sequence_id(*pair(retry)) == 202
    with pytest.raises(StoreError, match="at-ghost"):
        await store.get_next_span_sequence_id(first.rollout_id, "at-ghost")
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.get_many_span_sequence_ids([pair(first), ("ro-ghost", "at-1")])


async def test_spans_of_unknown_attempts_are_refused_by_name(store: Store) -> None:
    (claim,) = await leased(store)
    stranger = claim.model_copy(update={"rollout_id": "ro-ghost"})
    lost = claim.model_copy(update={"attempt": claim.attempt.model_copy(update={"attempt_id": "at-ghost"})})
    for bad in (stranger, lost):
        mixed = spans_to_batch([span(bad, 0), span(claim, 0), span(bad, 1), span(claim, 1)])
        with pytest.raises(StoreError, match="-ghost"):
            await store.append_spans(mixed)
        with pytest.raises(StoreError, match="-ghost"):
            await finish(store, claim, spans=mixed)
    assert (await store.scan_spans([claim.rollout_id]))["span_id"].to_pylist() == ["s0", "s1"]
    assert (await finish(store, claim)).status == "succeeded"


async def test_querying_spans(store: Store) -> None:
    (claim,) = await leased(store, config=RETRY)
    rows = [
        span(claim, 0, name="outer", start_time=1.0),
        span(claim, 1, name="call", parent_id="s0", start_time=3.0),
        span(claim, 2, name="call", parent_id="s0", trace_id="other", start_time=2.0),
    ]
    await store.append_spans(spans_to_batch(rows))
    await finish(store, claim, "failed")
    (retry,) = await store.dequeue_many_rollouts(worker_id="w")
    await store.append_spans(spans_to_batch([span(retry, 3, name="last")]))

    async def ids(attempt_id: Any = None, **where: Any) -> list[str]:
        return [found.span_id for found in await store.query_spans(claim.rollout_id, attempt_id, **where)]

    assert await ids() == ["s0", "s1", "s2", "s3"]
    assert await ids("latest") == ["s3"]
    assert await ids(claim.attempt.attempt_id) == ["s0", "s1", "s2"]
    assert await ids(name="call") == ["s1", "s2"]
    assert await ids(name_contains="al", trace_id="other") == ["s2"]
    assert await ids(name="outer", trace_id="other", filter_logic="or") == ["s0", "s2"]
    assert await ids(parent_id_contains="0", sort_by="start_time") == ["s2", "s1"]
    assert await ids(sort_by="start_time", sort_order="desc") == ["s1", "s2", "s0", "s3"]
    assert await ids(span_id_contains="s", limit=2, offset=1) == ["s1", "s2"]
    assert await ids(limit=0) == []
    assert (await store.query_spans(claim.rollout_id, limit=1)).total == 4
    assert await ids(span_id="s9") == []
    for bad in ({"sort_by": "attributes"}, {"sort_by": "nothing"}):
        with pytest.raises(StoreError, match=bad["sort_by"]):
            await ids(**bad)
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.query_spans("ro-ghost")
    with pytest.raises(StoreError, match="at-ghost"):
        await store.query_spans(claim.rollout_id, "at-ghost")


async def test_scanning_spans(store: Store) -> None:
    claims = await leased(store, 2)
    for claim in claims:
        await store.append_spans(spans(claim, 2))
    ids = [claim.rollout_id for claim in claims]
    table = await store.scan_spans([ids[1], ids[0], ids[1]], columns=["span_id", "rollout_id"])
    assert table.column_names == ["span_id", "rollout_id"]
    assert table["rollout_id"].to_pylist() == [ids[1], ids[1], ids[0], ids[0]]
    assert (await store.scan_spans(ids, "latest")).num_rows == 4
    queued = await store.enqueue_rollout(1)
    empty = await store.scan_spans([queued.rollout_id], "latest")
    assert (empty.num_rows, empty.schema) == (0, SPAN_SCHEMA)
    with pytest.raises(StoreError, match="colour"):
        await store.scan_spans(ids, columns=["colour"])


# --- query ----------------------------------------------------------------------------------------------------


async def test_querying_rollouts(store: Store) -> None:
    mark = fresh("q")
    ids = [f"ro-{mark}-{number}" for number in range(5)]
    modes: list[Any] = ["train", "val", None, "test", "train"]
    for rollout_id, mode in zip(ids, modes, strict=True):
        await store.enqueue_rollout(1, mode=mode, rollout_id=rollout_id)
    claims = {claim.rollout_id: claim for claim in await store.dequeue_many_rollouts(limit=5, worker_id="w")}
    await finish(store, claims[ids[0]])
    await finish(store, claims[ids[1]], "failed")
    await store.update_rollout(ids[2], status="queuing")

    async def found(**where: Any) -> list[str]:
        return [rollout.rollout_id for rollout in await store.query_rollouts(**where)]

    assert await found() == ids
    assert await found(status_in=["succeeded", "queuing"]) == [ids[0], ids[2]]
    assert await found(status_in=["preparing", "queuing", "running"]) == ids[2:]
    assert await found(status=["failed"]) == [ids[1]]
    assert await found(rollout_id_in=[ids[3], "ro-ghost", ids[1]]) == [ids[1], ids[3]]
    assert await found(rollout_ids=[ids[3]]) == [ids[3]]
    assert await found(rollout_id_in=ids[:2], status_in=["failed"]) == [ids[1]]
    assert await found(rollout_id_in=ids[3:4], status_in=["failed"], filter_logic="or") == [ids[1], ids[3]]
    assert await found(rollout_id_contains=f"{mark}-4") == [ids[4]]
    assert await found(rollout_id_in=[]) == []
    assert await found(sort_by="rollout_id", sort_order="desc", limit=2, offset=1) == [ids[3], ids[2]]
    assert (await found(sort_by="mode"))[-1] == ids[2]
    assert (await found(sort_by="mode", sort_order="desc"))[-1] == ids[2]
    assert await found(limit=2, offset=4) == ids[4:]
    page = await store.query_rollouts(status_in=["preparing"], limit=1)
    assert (len(page), page.total, page.limit, page.offset) == (1, 2, 1, 0)
    page = await store.query_rollouts(status_in=["succeeded", "failed"], limit=1, offset=1)
    assert ([rollout.rollout_id for rollout in page], page.total) == ([ids[1]], 2)
    page = await store.query_rollouts(status_in=["succeeded"], rollout_id_in=ids[1:], limit=1)
    assert (list(page), page.total) == ([], 0)
    for bad in ({"sort_by": "input"}, {"sort_order": "up"}, {"filter_logic": "xor"}, {"offset": -1}):
        with pytest.raises(StoreError, match=str(next(iter(bad.values())))):
            await found(**bad)


async def test_rollouts_come_with_their_latest_attempt(store: Store) -> None:
    (claim,) = await leased(store, config=RETRY)
    queued = await store.enqueue_rollout(1)
    with_attempt = await store.get_rollout_by_id(claim.rollout_id)
    assert isinstance(with_attempt, AttemptedRollout) and with_attempt == claim
    without = await store.get_rollout_by_id(queued.rollout_id)
    assert without == queued and not isinstance(without, AttemptedRollout)
    assert await store.get_rollout_by_id("ro-ghost") is None
    assert await store.get_latest_attempt(claim.rollout_id) == claim.attempt
    assert await store.get_latest_attempt(queued.rollout_id) is None
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.get_latest_attempt("ro-ghost")
    await finish(store, claim, "failed")
    second = await store.start_attempt(claim.rollout_id)
    attempts = await store.query_attempts(claim.rollout_id)
    assert [attempt.sequence_id for attempt in attempts] == [1, 2]
    (last,) = await store.query_attempts(claim.rollout_id, sort_order="desc", limit=1)
    assert last == second.attempt
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.query_attempts("ro-ghost")


async def test_answers_are_copies(store: Store) -> None:
    queued = await store.enqueue_rollout({"q": 1}, metadata={"a": 1})
    queued.input["q"] = 2
    queued.metadata = None
    found = await store.get_rollout_by_id(queued.rollout_id)
    assert found is not None and (found.input, found.metadata) == ({"q": 1}, {"a": 1})


async def test_what_cannot_be_stored_is_refused_by_name(store: Store) -> None:
    with pytest.raises(StoreError, match=r"builtins\.object"):
        await store.enqueue_rollout({"q": object()})
    with pytest.raises(StoreError, match="rs-ghost"):
        await store.enqueue_rollout(1, resources_id="rs-ghost")
    with pytest.raises(StoreError, match="no call"):
        await store._call("steal")


# --- resources and statistics ---------------------------------------------------------------------------------


async def test_resources(store: Store) -> None:
    resources: Any = {"llm": LLM(endpoint="http://h/v1", model="m"), "p": PromptTemplate(template="{q}")}
    added = await store.add_resources(resources)
    assert (added.resources, added.version) == (resources, 1)
    assert await store.get_latest_resources() == added
    assert await store.update_resources(added.resources_id, resources) == added
    assert await store.get_resources_by_id(added.resources_id) == added
    assert await store.get_resources_by_id("rs-ghost") is None
    assert (await leased(store))[0].resources_id == added.resources_id
    mark = fresh("rs")
    await store.update_resources(mark, resources)
    changed = await store.update_resources(mark, {"p": PromptTemplate(template="other")})
    assert (changed.version, changed.update_time >= changed.create_time) == (2, True)
    assert (await store.query_resources(resources_id=mark))[0] == changed
    found = await store.query_resources(sort_by="create_time", sort_order="desc", limit=2)
    assert [update.resources_id for update in found] == [mark, added.resources_id]
    assert (await store.query_resources(resources_id_contains=mark[3:])).total == 1
    assert (await store.query_resources(resources_id=mark, resources_id_contains="no")).total == 0


async def test_statistics(store: Store) -> None:
    before = await store.statistics()
    (claim,) = await leased(store)
    await finish(store, claim, spans=spans(claim, 2))
    after = await store.statistics()
    for key, more in {"rollouts": 1, "attempts": 1, "spans": 2}.items():
        assert after[f"total_{key}"] - before[f"total_{key}"] == more
    assert (after["queued"], after["live_attempts"]) == (0, 0)
    assert after["rollouts_by_status"]["succeeded"] - before["rollouts_by_status"].get("succeeded", 0) == 1
    assert after["name"] and after["uptime"] >= 0 and after["disk_bytes"] > 0
    assert {"total_resources", "total_workers"} <= after.keys()


async def test_capabilities_and_compaction(store: Store) -> None:
    assert set(store.capabilities) == {"thread_safe", "async_safe", "zero_copy", "otlp_traces"}
    if not store.capabilities["otlp_traces"]:
        with pytest.raises(StoreError, match="OTLP"):
            store.otlp_traces_endpoint()
    (claim,) = await leased(store)
    await finish(store, claim, spans=spans(claim, 2))
    await store.compact()
    assert (await store.scan_spans([claim.rollout_id]))["span_id"].to_pylist() == ["s0", "s1"]
    assert (await store.get_rollout_by_id(claim.rollout_id)).status == "succeeded"  # type: ignore[union-attr]
    assert await store.append_spans(spans(claim, 3)) == [0, 1]


async def test_sql(store: Store) -> None:
    pytest.importorskip("duckdb")
    (claim,) = await leased(store)
    await finish(store, claim, spans=spans(claim, 3, reward=0.5))
    answer = await store.sql(
        f"SELECT avg(reward) AS r, count(*) AS n FROM spans WHERE rollout_id = '{claim.rollout_id}'"
    )
    assert answer.to_pylist() == [{"r": 0.5, "n": 3}]
