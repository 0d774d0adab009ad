"""The store's contract as its clients see it, once in-process and once on a Ray actor; and what kill -9 of
the actor leaves."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store import (
    LocalStoreClient,
    SpanStore,
    Store,
    StoreClient,
    open_folder,
    read_spans,
    spans_to_batch,
)
from lightning_ray.types import LLM, AttemptedRollout, EnqueueRolloutRequest, RolloutConfig

RETRY = RolloutConfig(max_attempts=2, retry_condition=["failed"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="lr", dir="/tmp")
    ray.init(
        "local",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=100_000_000,
        _temp_dir=folder,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def handle(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from actors.span_store import start

    return start(tmp_path_factory.mktemp("store"), "contract")


@pytest.fixture(params=["local", "ray"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "ray":
        client = StoreClient(request.getfixturevalue("handle"))
        yield client
        for rollout in await client.query_rollouts(["queuing", "requeuing", "preparing", "running"]):
            await client.update_rollout(rollout.rollout_id, "cancelled")
    else:
        local = LocalStoreClient(SpanStore(tmp_path))
        yield local
        await local.close()


def spans(claim: AttemptedRollout, count: int = 1, first: int = 0, **fields: Any) -> pa.RecordBatch:
    return spans_to_batch(
        {
            "rollout_id": claim.rollout_id,
            "attempt_id": claim.attempt.attempt_id,
            "sequence_id": number,
            "trace_id": "t",
            "span_id": f"s{number}",
            "name": "openai.chat.completion",
            "prompt_ids": list(range(600)),
            "sampled_ids": [number] * 150,
            **fields,
        }
        for number in range(first, first + count)
    )


async def leased(store: Store, count: int = 1, **request: Any) -> list[AttemptedRollout]:
    await store.enqueue_many_rollouts([EnqueueRolloutRequest(input={"q": n}, **request) for n in range(count)])
    return await store.dequeue_many_rollouts(count, "worker")


async def finish(store: Store, claim: AttemptedRollout, status: str = "succeeded", **more: Any) -> Any:
    return await store.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, status, **more)


async def test_a_rollouts_way(store: Store) -> None:
    queued = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input={"q": (1, 2)}, mode="train")])
    (claim,) = await store.dequeue_many_rollouts(5, "w-1")
    assert (claim.rollout_id, claim.input, claim.mode) == (queued[0].rollout_id, {"q": [1, 2]}, "train")
    assert (claim.status, claim.attempt.worker_id, claim.attempt.sequence_id) == ("preparing", "w-1", 1)
    await store.add_many_spans(spans(claim))
    assert (await store.query_rollouts(["running"]))[0].rollout_id == claim.rollout_id
    rollout = await finish(store, claim, spans=spans(claim, first=1, reward=0.5), metadata={"seconds": 1.5})
    assert (rollout.status, rollout.end_time is not None) == ("succeeded", True)
    (attempt,) = await store.query_attempts(claim.rollout_id)
    assert (attempt.status, attempt.metadata) == ("succeeded", {"seconds": 1.5})
    table = await store.query_spans([claim.rollout_id])
    assert table["sampled_ids"].to_pylist() == [[0] * 150, [1] * 150]
    assert table["reward"].to_pylist() == [None, 0.5]
    assert [span.span_id for span in read_spans(table)] == ["s0", "s1"]


async def test_resent_calls_count_once(store: Store) -> None:
    request = EnqueueRolloutRequest(rollout_id=f"ro-{time.time()}", input=1)
    for _ in range(2):
        await store.enqueue_many_rollouts([request, request])
    claims = await store.dequeue_many_rollouts(1, "w", request_id=f"rq-{request.rollout_id}")
    assert await store.dequeue_many_rollouts(1, "w", request_id=f"rq-{request.rollout_id}") == claims
    assert await store.dequeue_many_rollouts(1, "w") == []
    for _ in range(2):
        await store.add_many_spans(spans(claims[0], 3))
        await store.add_many_spans(spans(claims[0], 3, first=2))
    for _ in range(2):
        rollout = await finish(store, claims[0], spans=spans(claims[0], 2, first=4))
    assert rollout == (await store.query_rollouts(rollout_id_in=[claims[0].rollout_id]))[0]
    await store.add_many_spans(spans(claims[0], 7))
    table = await store.query_spans([claims[0].rollout_id])
    assert table["span_id"].to_pylist() == [f"s{number}" for number in range(7)]
    assert len(await store.query_attempts(claims[0].rollout_id)) == 1


async def test_retries_and_late_results(store: Store) -> None:
    (first,) = await leased(store, config=RETRY)
    assert (await finish(store, first, "failed")).status == "requeuing"
    (second,) = await store.dequeue_many_rollouts(1, "w")
    assert (second.rollout_id, second.attempt.sequence_id) == (first.rollout_id, 2)
    assert (await finish(store, first, spans=spans(first))).status == "preparing"
    assert (await finish(store, second)).status == "succeeded"
    assert (await store.query_spans([first.rollout_id]))["attempt_id"].to_pylist() == [first.attempt.attempt_id]


async def test_cancelling_reaches_the_worker(store: Store) -> None:
    claims = await leased(store, 2)
    held = [(claim.rollout_id, claim.attempt.attempt_id) for claim in claims]
    assert await store.heartbeat("worker", held) == []
    await store.update_rollout(claims[0].rollout_id, "cancelled")
    assert await store.heartbeat("worker", held) == held[:1]
    assert (await finish(store, claims[0])).status == "cancelled"


async def test_refusals_name_the_thing(store: Store) -> None:
    (claim,) = await leased(store)
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.finish_attempt("ro-ghost", "at-1", "succeeded")
    with pytest.raises(StoreError, match="'done'"):
        await finish(store, claim, "done")
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.wait_for_rollouts(["ro-ghost"], 1.0)
    stranger = claim.model_copy(update={"rollout_id": "ro-ghost"})
    mixed = pa.Table.from_batches([spans(stranger), spans(claim)]).combine_chunks().to_batches()[0]
    with pytest.raises(StoreError, match="ro-ghost"):
        await store.add_many_spans(mixed)
    assert (await store.query_spans([claim.rollout_id, "ro-ghost"])).num_rows == 1
    with pytest.raises(StoreError, match="ro-ghost"):
        await finish(store, claim, spans=mixed)
    assert (await finish(store, claim)).status == "succeeded"


async def test_a_dequeue_waits_for_work_and_no_longer(store: Store) -> None:
    begun = time.monotonic()
    assert await store.dequeue_many_rollouts(1, "w", timeout=0.3) == []
    assert 0.25 < time.monotonic() - begun < 2.0
    waiting = [asyncio.create_task(store.dequeue_many_rollouts(1, f"w{n}", timeout=20.0)) for n in range(4)]
    await asyncio.sleep(0.3)
    begun = time.monotonic()
    await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=n) for n in range(3)])
    done, pending = await asyncio.wait(waiting, timeout=5.0, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 3:
        more, pending = await asyncio.wait(pending, timeout=5.0, return_when=asyncio.FIRST_COMPLETED)
        assert more
        done |= more
    assert time.monotonic() - begun < 1.0
    claims = [claim for task in done for claim in task.result()]
    assert len({claim.rollout_id for claim in claims}) == 3
    await store.release_worker(claims[0].attempt.worker_id or "", "killed")
    assert (await asyncio.wait_for(pending.pop(), 5.0))[0].rollout_id == claims[0].rollout_id


async def test_a_released_worker_gets_nothing_any_more(store: Store) -> None:
    waiting = asyncio.create_task(store.dequeue_many_rollouts(1, "dead", timeout=20.0))
    await asyncio.sleep(0.3)
    other = asyncio.create_task(store.dequeue_many_rollouts(1, "alive", timeout=20.0))
    await asyncio.sleep(0.1)
    request = EnqueueRolloutRequest(input=1)
    await asyncio.gather(store.release_worker("dead", "killed"), store.enqueue_many_rollouts([request]))
    assert await asyncio.wait_for(waiting, 5.0) == []
    assert len(await asyncio.wait_for(other, 5.0)) == 1


async def test_waiting_for_rollouts(store: Store) -> None:
    claims = await leased(store, 3)
    ids = [claim.rollout_id for claim in claims]
    await finish(store, claims[0], "failed")
    assert [rollout.rollout_id for rollout in await store.wait_for_rollouts(ids, 0.2)] == ids[:1]
    waiting = asyncio.create_task(store.wait_for_rollouts(ids, 20.0))
    await asyncio.sleep(0.2)
    await finish(store, claims[1])
    await store.update_rollout(ids[2], "cancelled")
    rollouts = await asyncio.wait_for(waiting, 5.0)
    assert [rollout.status for rollout in rollouts] == ["failed", "succeeded", "cancelled"]


async def test_the_watchdog_needs_no_calls(store: Store) -> None:
    (claim,) = await leased(store, config=RolloutConfig(timeout_seconds=0.5))
    (rollout,) = await store.wait_for_rollouts([claim.rollout_id], 10.0)
    assert (rollout.metadata or {})["failure"]["kind"] == "timeout"


async def test_resources(store: Store) -> None:
    resources: Any = {"llm": LLM(endpoint="http://h/v1", model="m")}
    added = await store.add_resources(resources)
    assert await store.get_latest_resources() == added
    assert await store.update_resources(added.resources_id, resources) == added
    assert await store.get_resources_by_id("rs-ghost") is None
    assert (await leased(store))[0].resources_id == added.resources_id


async def test_statistics(store: Store) -> None:
    before = await store.statistics()
    (claim,) = await leased(store)
    await finish(store, claim, spans=spans(claim, 2))
    after = await store.statistics()
    assert (after["spans"] - before["spans"], after["rollouts"] - before["rollouts"]) == (2, 1)
    assert (after["queued"], after["live_attempts"]) == (0, 0)


async def test_answers_wait_for_the_disk_and_share_its_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate, syncs = LocalStoreClient(SpanStore(tmp_path)), threading.Event(), []

    def slow(fd: int) -> None:
        syncs.append(fd)
        gate.wait(10.0)

    monkeypatch.setattr("os.fdatasync", slow)
    requests = [EnqueueRolloutRequest(input=n) for n in range(50)]
    writes = [asyncio.create_task(store.enqueue_many_rollouts([request])) for request in requests]
    read = asyncio.create_task(store.query_rollouts())
    done, _ = await asyncio.wait([*writes, read], timeout=0.3)
    assert not done
    gate.set()
    await asyncio.wait_for(asyncio.gather(*writes, read), 5.0)
    assert len(syncs) <= 3
    await store.close()


async def test_a_failing_disk_is_told_to_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStoreClient(SpanStore(tmp_path))

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fdatasync", broken)
    requests = [EnqueueRolloutRequest(input=n) for n in range(3)]
    calls = [store.enqueue_many_rollouts([request]) for request in requests]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(answer, InfrastructureError) for answer in answers)
    with pytest.raises(InfrastructureError, match="Input/output error"):
        await store.query_rollouts()


async def test_the_client_can_be_pickled(handle: Any, cluster: Any) -> None:
    @cluster.remote
    def count(client: StoreClient) -> int:
        return asyncio.run(client.statistics())["rollouts"]

    client = StoreClient(handle)
    assert await count.remote(client) == (await client.statistics())["rollouts"]
    assert isinstance(pickle.loads(cluster.cloudpickle.dumps(client)), StoreClient)


async def test_kill_9_under_load_loses_nothing_acknowledged(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    actor = start(tmp_path, "killed")
    store, acknowledged, stop = StoreClient(actor, deadline=60.0), {}, asyncio.Event()
    finished: asyncio.Queue[str] = asyncio.Queue()

    async def work(worker_id: str) -> None:
        while not stop.is_set():
            await store.enqueue_many_rollouts([EnqueueRolloutRequest(input={"by": worker_id})])
            for claim in await store.dequeue_many_rollouts(1, worker_id, timeout=1.0):
                await store.add_many_spans(spans(claim, 8))
                await finish(store, claim, spans=spans(claim, 1, first=8))
                assert claim.rollout_id not in acknowledged
                acknowledged[claim.rollout_id] = claim.attempt.attempt_id
                finished.put_nowait(claim.rollout_id)

    workers = [asyncio.create_task(work(f"w{n}")) for n in range(8)]
    for kill in (True, True, False):
        for _ in range(30):
            await asyncio.wait_for(finished.get(), 30.0)
        if kill:
            os.kill(await actor.process_id.remote(), signal.SIGKILL)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*workers), 60.0)
    await actor.close.remote()
    cluster.kill(actor)

    view = open_folder(tmp_path)
    assert {rollout.rollout_id for rollout in view.query_rollouts(["succeeded"])} == acknowledged.keys()
    for rollout_id, attempt_id in acknowledged.items():
        assert [attempt.attempt_id for attempt in view.query_attempts(rollout_id)] == [attempt_id]
        found = view.query_spans([rollout_id])
        assert found["span_id"].to_pylist() == [f"s{number}" for number in range(9)]
        assert found["sampled_ids"].to_pylist() == [[number] * 150 for number in range(9)]


async def test_an_actor_that_is_gone_is_named_at_the_deadline(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    actor = start(tmp_path, "gone")
    store = StoreClient(actor, deadline=1.0)
    await StoreClient(actor).statistics()
    cluster.kill(actor)
    with pytest.raises(InfrastructureError, match="statistics"):
        for _ in range(100):
            await store.statistics()
            await asyncio.sleep(0.05)


async def test_an_actor_that_cannot_start_says_why(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "00000001.log").write_bytes(b"not a log")
    (tmp_path / "log" / "00000002.log").write_bytes(b"")
    begun = time.monotonic()
    with pytest.raises(InfrastructureError, match="damaged"):
        await StoreClient(start(tmp_path, "damaged")).statistics()
    assert time.monotonic() - begun < 30.0
