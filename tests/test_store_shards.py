"""Several stores behind one client: they answer as one, whatever part of them fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.cli import main
from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store import LocalStoreClient, Page, SpanStore, StoreClient, open_folder, shard_queue, spans_to_batch
from lightning_ray.store import shards as shards_module
from lightning_ray.store.base import Finish, Store
from lightning_ray.store.shard_folder import ShardedView, ShardLayout, check_layout, shard_folder, write_layout
from lightning_ray.store.shard_merge import shard_of
from lightning_ray.store.shards import ShardedStore
from lightning_ray.types import LLM, EnqueueRolloutRequest, Worker
from tests.store_stores import cluster as cluster

IDS = {0: ["a0", "a7"], 1: ["a2", "a5"], 2: ["a1", "a3"]}


class Flaky(Store):
    """A shard that can be made to fail, to lose its answers, or to fall silent."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.mode = "well"
        self.asked: list[str] = []

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        self.asked.append(name)
        if self.mode == "silent":
            await asyncio.Event().wait()
        if self.mode == "dead":
            raise InfrastructureError("no process")
        answer = await self.store._call(name, *args, timeout=timeout)
        if self.mode == "loses answers":
            raise InfrastructureError("died after the write")
        return answer


class Three:
    """Three local shards that can fail, and their client."""

    def __init__(self, folder: Path, clock: Any = None) -> None:
        options = {} if clock is None else {"clock": clock}
        self.folder = folder
        folder.mkdir(exist_ok=True)
        write_layout(folder, ShardLayout(3, ["here"] * 3))
        self.locals = [
            LocalStoreClient(SpanStore(shard_folder(folder, shard), fsync="none", **options)) for shard in range(3)
        ]
        self.shards = [Flaky(local) for local in self.locals]
        self.store = ShardedStore(self.shards)

    async def close(self) -> None:
        for local in self.locals:
            await local.close()


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Three]:
    made = Three(tmp_path / "store")
    yield made
    await made.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_queue, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(shards_module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(shard_queue, "_GRACE_SECONDS", 0.05)


def requests(*ids: str, **fields: Any) -> list[EnqueueRolloutRequest]:
    return [EnqueueRolloutRequest(rollout_id=rollout_id, input={"of": rollout_id}, **fields) for rollout_id in ids]


def batch(*pairs: tuple[str, str], first: int = 0) -> pa.RecordBatch:
    return spans_to_batch(
        {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "sequence_id": 0,
            "trace_id": "t",
            "span_id": f"s{first + number}",
            "name": "step",
        }
        for number, (rollout_id, attempt_id) in enumerate(pairs)
    )


async def started(store: Store, *ids: str) -> list[tuple[str, str]]:
    """Rollouts with an attempt each, as (rollout, attempt) ids."""
    await store.enqueue_many_rollouts(requests(*ids))
    claims = await store.dequeue_many_rollouts(limit=len(ids), worker_id="w")
    found = {claim.rollout_id: claim.attempt.attempt_id for claim in claims}
    return [(rollout_id, found[rollout_id]) for rollout_id in ids]


# --- where a rollout is -------------------------------------------------------------------------------------


def test_a_rollout_keeps_its_shard_for_ever() -> None:
    ids = ["a0", "ro-0123456789abcdef", "a rollout, größer", ""]
    assert [shard_of(rollout_id, 3) for rollout_id in ids] == [0, 1, 2, 0]
    assert [shard_of(rollout_id, 8) for rollout_id in ids] == [5, 6, 3, 0]
    assert all(shard_of(rollout_id, 3) == shard for shard, ids in IDS.items() for rollout_id in ids)


def test_a_client_without_shards_is_refused() -> None:
    with pytest.raises(StoreError, match="at least one"):
        ShardedStore([])


def test_a_folder_keeps_its_number_of_shards(tmp_path: Path) -> None:
    assert check_layout(tmp_path, 3) is None
    write_layout(tmp_path, ShardLayout(3, ["one", "two", "three"]))
    assert check_layout(tmp_path, 3) == ShardLayout(3, ["one", "two", "three"])
    for other in (1, 2):
        with pytest.raises(StoreError, match=rf"has 3 shard\(s\) and cannot be opened with {other}"):
            check_layout(tmp_path, other)
    with pytest.raises(StoreError, match=r"shard-000 is not here; it was written on node one"):
        ShardedView(tmp_path)
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(StoreError, match=r"shards\.json is damaged"):
        check_layout(tmp_path, 3)


async def test_a_folder_of_one_store_is_not_taken_for_shards(tmp_path: Path) -> None:
    local = LocalStoreClient(SpanStore(tmp_path))
    await local.close()
    assert check_layout(tmp_path, 1) is None
    with pytest.raises(StoreError, match=r"has 1 shard\(s\) and cannot be opened with 3"):
        check_layout(tmp_path, 3)


# --- as one store -------------------------------------------------------------------------------------------

STATUSES = ["succeeded", "failed"]
NAMES = st.sampled_from([f"a{number}" for number in range(8)])
ACTS = st.one_of(
    st.tuples(st.just("enqueue"), st.lists(NAMES, min_size=1, max_size=3, unique=True)),
    st.tuples(st.just("start"), NAMES, st.integers(0, 3), st.sampled_from(["w0", "w1"])),
    st.tuples(
        st.just("spans"), st.lists(st.tuples(NAMES, st.integers(0, 3)), min_size=1, max_size=6), st.integers(0, 4)
    ),
    st.tuples(st.just("finish"), st.lists(st.tuples(NAMES, st.integers(0, 3), st.sampled_from(STATUSES)), max_size=1)),
    st.tuples(st.just("numbers"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("cancel"), NAMES),
    st.tuples(st.just("delete"), st.lists(NAMES, max_size=3)),
    st.tuples(st.just("resources"), st.sampled_from(["r0", "r1"]), st.sampled_from(["m0", "m1"])),
    st.tuples(st.just("worker"), st.sampled_from(["w0", "w1"]), st.integers(0, 9)),
)


async def act(store: Store, kind: str, *args: Any) -> Any:
    match kind, args:
        case "enqueue", [ids]:
            return await store.enqueue_many_rollouts(requests(*ids))
        case "start", [rollout_id, attempt, worker_id]:
            request = requests(rollout_id)[0].model_copy(update={"rollout_id": rollout_id})
            return await store._call("start_rollout", request, f"{rollout_id}.{attempt}", worker_id)
        case "spans", [pairs, first]:
            return await store.append_spans(batch(*((each, f"{each}.{n}") for each, n in pairs), first=first))
        case "finish", [finishes]:
            ends = [Finish(each, f"{each}.{attempt}", status) for each, attempt, status in finishes]
            return await store.finish_many_attempts(ends)
        case "numbers", [rollout_id, attempt]:
            return await store.get_next_span_sequence_id(rollout_id, f"{rollout_id}.{attempt}")
        case "cancel", [rollout_id]:
            return await store.update_rollout(rollout_id, status="cancelled")
        case "delete", [ids]:
            return await store.delete_rollouts(ids)
        case "resources", [resources_id, model]:
            return await store.update_resources(resources_id, {"llm": LLM(endpoint="e", model=model)})
        case "worker", [worker_id, load]:
            return await store.update_worker(worker_id, {"load": load})
    raise AssertionError(kind)


async def outcome(store: Store, *call: Any) -> Any:
    try:
        return "answer", plain(await act(store, *call))
    except StoreError:
        return "refused", None


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Worker):  # which of its attempts is the current one only one store knows
        return value.model_dump(include={"worker_id", "last_heartbeat_time", "heartbeat_stats"})
    return value.model_dump() if hasattr(value, "model_dump") else value


async def answers(store: Store) -> dict[str, Any]:
    """What a store says of itself, without the order that shards do not keep."""
    everything = await store.query_rollouts(sort_by="rollout_id")
    ids = [rollout.rollout_id for rollout in everything]
    known = await store.query_rollouts()
    seen: dict[str, Any] = {
        "all": plain(everything.items),
        "total": everything.total,
        "in order of creation": [rollout.start_time for rollout in known],
        "ended": plain((await store.query_rollouts(status_in=["succeeded"], sort_by="rollout_id")).items),
        "either": plain(
            (
                await store.query_rollouts(
                    status_in=["failed"], rollout_id_in=ids[:2], filter_logic="or", sort_by="rollout_id"
                )
            ).items
        ),
        "statuses": [each.status for each in await store.query_rollouts(sort_by="status", sort_order="desc", limit=4)],
        "modes": (await store.query_rollouts(rollout_id_in=ids[1:4], sort_by="end_time", limit=2)).total,
        "spans": (await store.scan_spans(ids[::-1], columns=["span_id", "sequence_id"])).to_pylist(),
        "latest": (await store.scan_spans(ids, "latest")).column("attempt_id").to_pylist(),
        "workers": plain((await store.query_workers(sort_by="worker_id")).items),
        "resources": plain((await store.query_resources()).items),
        "newest": plain(await store.get_latest_resources()),
        "statistics": {key: (await store.statistics())[key] for key in ("total_rollouts", "total_spans", "queued")},
        "counts": {key: (await store.statistics())[key] for key in ("total_workers", "total_resources")},
    }
    pages = [
        await store.query_rollouts(sort_by="rollout_id", sort_order="desc", limit=2, offset=offset)
        for offset in range(0, len(ids) + 2, 2)
    ]
    seen["pages"] = [[each.rollout_id for each in page] for page in pages]
    seen["totals"] = [page.total for page in pages]
    return seen


async def assert_reads_as(view: Any, store: Store) -> None:
    """The folder read without a process says what the store says; signs of life are not in it."""
    known = await store.query_rollouts(sort_by="rollout_id")
    ids = [rollout.rollout_id for rollout in known]
    there = view.query_rollouts(None, Page("rollout_id"))
    assert [(each.rollout_id, each.status, each.end_time) for each in there] == [
        (each.rollout_id, each.status, each.end_time) for each in known
    ]
    assert view.scan_spans(ids[::-1], "latest", ["span_id"]).equals(
        await store.scan_spans(ids[::-1], "latest", ["span_id"])
    )
    assert view.table().num_rows == view.statistics()["total_spans"] == (await store.statistics())["total_spans"]
    assert plain(view.get_latest_resources()) == plain(await store.get_latest_resources())
    assert {worker.worker_id for worker in view.query_workers()} == {
        worker.worker_id for worker in await store.query_workers()
    }
    for rollout_id in ids:
        attempts = [attempt.attempt_id for attempt in await store.query_attempts(rollout_id)]
        assert [attempt.attempt_id for attempt in view.query_attempts(rollout_id)] == attempts
        assert view.scan_spans([rollout_id]).equals(await store.scan_spans([rollout_id]))


async def side_by_side(folder: Path, acts: list[Any]) -> None:
    now = [1000.0]
    one = LocalStoreClient(SpanStore(folder / "one", lambda: now[0], "none"))
    three = Three(folder / "three", lambda: now[0])
    try:
        for call in acts:
            now[0] += 1.0
            assert await outcome(three.store, *call) == await outcome(one, *call), call
        assert await answers(three.store) == await answers(one)
        await assert_reads_as(open_folder(folder / "three"), three.store)
        drained = [
            sorted(claim.rollout_id for claim in await store.dequeue_many_rollouts(limit=100, worker_id="w0"))
            for store in (one, three.store)
        ]
        assert drained[0] == drained[1]
    finally:
        await one.close()
        await three.close()


@settings(max_examples=40)
@given(st.lists(ACTS, max_size=25))
def test_three_shards_answer_as_one_store(acts: list[Any]) -> None:
    with TemporaryDirectory() as folder:
        asyncio.run(side_by_side(Path(folder), acts))


async def test_unsorted_rollouts_come_in_order_of_creation_page_by_page(tmp_path: Path) -> None:
    now = [0.0]
    three = Three(tmp_path / "store", lambda: now[0])
    ids = [f"a{number}" for number in range(9)]
    for rollout_id in ids:
        now[0] += 1.0
        await three.store.enqueue_many_rollouts(requests(rollout_id))
    pages = [await three.store.query_rollouts(limit=4, offset=offset) for offset in (0, 4, 8, 12)]
    assert [rollout.rollout_id for page in pages for rollout in page] == ids
    assert [(page.total, page.limit, page.offset) for page in pages] == [(9, 4, 0), (9, 4, 4), (9, 4, 8), (9, 4, 12)]
    await three.close()


async def test_spans_come_in_the_order_of_the_ids_asked(three: Three) -> None:
    one, two, other = await started(three.store, "a0", "a1", "a7")
    await three.store.append_spans(batch(other, one, two, one, other, two))
    spans = await three.store.scan_spans(["a1", "a7", "a0", "a1"], columns=["span_id"])
    assert spans.to_pydict() == {"span_id": ["s2", "s5", "s0", "s4", "s1", "s3"]}
    assert (await three.store.scan_spans(["a0", "a1"], two[1])).column("span_id").to_pylist() == ["s2", "s5"]
    with pytest.raises(StoreError, match="no attempt 'at-none'"):
        await three.store.scan_spans(["a0", "a1"], "at-none")
    with pytest.raises(StoreError, match="no rollout 'ro-none'"):
        await three.store.scan_spans(["a0", "ro-none", "a1"])
    assert (await three.store.scan_spans([])).num_rows == 0


async def test_rows_left_out_are_rows_of_the_whole_batch(three: Three) -> None:
    pairs = await started(three.store, "a0", "a1", "a2", "a3")
    await three.store.append_spans(batch(*pairs))
    again = pa.concat_tables(
        [pa.Table.from_batches([batch(*pairs[1:3], first=1)])] * 2 + [pa.table(batch(*pairs, first=9))]
    )
    assert await three.store.append_spans(again.combine_chunks().to_batches()[0]) == [0, 1, 2, 3]
    with pytest.raises(StoreError, match="ro-x"):
        await three.store.append_spans(batch(("ro-x", "at"), *pairs, first=99))
    assert (await three.store.scan_spans(["a0", "a1", "a2", "a3"])).num_rows == 12


async def test_finishing_with_spans_of_a_shard_that_has_nothing_to_finish_is_refused_whole(three: Three) -> None:
    (one, attempt), other = await started(three.store, "a0", "a1")
    with pytest.raises(StoreError, match="does not name, 'a1'"):
        await three.store.finish_many_attempts([Finish(one, attempt, "succeeded")], batch(other))
    assert [rollout.status for rollout in await three.store.query_rollouts()] == ["preparing", "preparing"]


async def test_a_worker_of_several_shards_is_one(three: Three) -> None:
    pairs = await started(three.store, "a0", "a1", "a2")
    await three.store.finish_attempt(*pairs[0], "succeeded")
    await three.store.update_worker("w", {"load": 2})
    [worker] = await three.store.query_workers(status_in=["busy"])
    assert worker.current_rollout_id in ("a1", "a2")
    assert worker == await three.store.get_worker_by_id("w")
    assert worker.heartbeat_stats == {"load": 2}
    assert (await three.store.query_workers(status_in=["idle", "unknown"])).total == 0
    statistics = await three.store.statistics()
    assert (statistics["total_workers"], statistics["live_attempts"], statistics["rollouts"]) == (1, 2, 3)
    for pair in pairs[1:]:
        await three.store.finish_attempt(*pair, "failed")
    assert [worker.status for worker in await three.store.query_workers()] == ["idle"]
    assert await three.store.get_worker_by_id("nobody") is None


async def test_a_lost_worker_gives_back_what_it_has_in_every_shard(three: Three) -> None:
    await started(three.store, "a0", "a1", "a2")
    assert await three.store.release_worker("w", "died") == ["a0", "a1", "a2"]
    assert [rollout.status for rollout in await three.store.query_rollouts()] == ["requeuing"] * 3


async def test_sql_sees_one_store(three: Three) -> None:
    pytest.importorskip("duckdb")
    pairs = await started(three.store, "a0", "a1", "a2")
    await three.store.append_spans(batch(*pairs, *pairs[:2]))
    await three.store.update_resources("r", {"llm": LLM(endpoint="e", model="m")})
    await three.store.update_worker("w", {"load": 1})
    counted = "SELECT rollout_id, count(*) AS n FROM spans GROUP BY rollout_id ORDER BY rollout_id"
    assert (await three.store.sql(counted)).to_pydict() == {"rollout_id": ["a0", "a1", "a2"], "n": [2, 2, 1]}
    for table, count in {"workers": 1, "resources": 1, "rollouts": 3}.items():
        assert (await three.store.sql(f"SELECT count(*) AS n FROM {table}")).to_pylist() == [{"n": count}]
    tables = await three.store._call("tables", None)
    assert {name: tables[name].num_rows for name in ("spans", "workers", "resources")} == {
        "spans": 5,
        "workers": 1,
        "resources": 1,
    }


async def test_the_command_line_reads_a_sharded_folder_as_one(three: Three, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("duckdb")
    await started(three.store, "a0", "a1", "a2")
    await three.store.update_resources("r", {"llm": LLM(endpoint="e", model="m")})
    query = "SELECT count(*) AS rollouts, (SELECT count(*) FROM resources) AS published FROM rollouts"
    assert main(["spans", query, str(three.folder), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rollouts": 3, "published": 1}


async def test_a_client_travels_with_its_shards() -> None:
    copy = pickle.loads(pickle.dumps(ShardedStore([Nowhere(), Nowhere()])))
    assert len(copy.shards) == 2
    with pytest.raises(InfrastructureError, match="shard 1 of 2: nowhere"):
        await copy.get_rollout_by_id("a2" if shard_of("a2", 2) else "a0")


class Nowhere(Store):
    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        raise InfrastructureError("nowhere")


# --- queues and waits ---------------------------------------------------------------------------------------


async def test_a_dequeue_is_filled_from_all_shards_in_turn(three: Three) -> None:
    ids = [rollout_id for shard in IDS.values() for rollout_id in shard]
    await three.store.enqueue_many_rollouts(requests(*ids))
    firsts = [await three.store.dequeue_rollout("w") for _ in range(3)]
    assert {shard_of(claim.rollout_id, 3) for claim in firsts if claim} == {0, 1, 2}
    assert all(claim.rollout_id == IDS[shard_of(claim.rollout_id, 3)][0] for claim in firsts if claim)
    rest = await three.store.dequeue_many_rollouts(limit=10, worker_id="w")
    assert sorted(claim.rollout_id for claim in rest) == sorted(ids[1] for ids in IDS.values())
    assert await three.store.dequeue_many_rollouts(limit=10, worker_id="w") == []


@pytest.mark.parametrize("rollout_id", ["a0", "a2", "a1"])
async def test_a_waiting_dequeue_wakes_whichever_shard_is_fed(three: Three, rollout_id: str) -> None:
    waiting = asyncio.create_task(three.store.dequeue_rollout("w", timeout=60.0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await three.store.enqueue_many_rollouts(requests(rollout_id))
    claim = await asyncio.wait_for(waiting, 30.0)
    assert claim is not None and claim.rollout_id == rollout_id
    assert await three.store.dequeue_rollout("w", timeout=0.05) is None
    worker = await three.store.get_worker_by_id("w")
    assert worker is not None and worker.status == "busy"


async def test_an_abandoned_wait_claims_nothing(three: Three) -> None:
    waiting = asyncio.create_task(three.store.dequeue_many_rollouts(limit=3, worker_id="w", timeout=60.0))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await three.store.enqueue_many_rollouts(requests("a0", "a1", "a2"))
    assert (await three.store.statistics())["queued"] == 3
    assert len(await three.store.dequeue_many_rollouts(limit=3, worker_id="w")) == 3


async def test_claims_of_an_abandoned_dequeue_are_the_workers_next(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    await three.store.enqueue_many_rollouts(requests("a0", "a1", "a2"))
    gate = asyncio.Event()
    call = three.shards[2]._call

    async def slow(name: str, *args: Any, timeout: float | None = None) -> Any:
        if name == "dequeue_many_rollouts":
            await gate.wait()
        return await call(name, *args, timeout=timeout)

    monkeypatch.setattr(three.shards[2], "_call", slow)
    waiting = asyncio.create_task(three.store.dequeue_many_rollouts(limit=3, worker_id="w", timeout=60.0))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    gate.set()
    claims = await three.store.dequeue_many_rollouts(limit=3, worker_id="w", timeout=60.0)
    while len(claims) < 3:
        claims += await three.store.dequeue_many_rollouts(limit=3, worker_id="w", timeout=60.0)
    assert sorted(claim.rollout_id for claim in claims) == ["a0", "a1", "a2"]
    assert (await three.store.statistics())["total_attempts"] == 3


async def test_many_dequeues_at_once_get_everything_once(three: Three) -> None:
    ids = [f"ro{number}" for number in range(40)]
    waiting = [asyncio.create_task(three.store.dequeue_many_rollouts(limit=2, timeout=60.0)) for _ in range(10)]
    claimed: list[str] = []
    for start in range(0, 40, 5):
        await three.store.enqueue_many_rollouts(requests(*ids[start : start + 5]))
    while len(claimed) < 40:
        done, _ = await asyncio.wait(waiting, timeout=30.0, return_when=asyncio.FIRST_COMPLETED)
        assert done, "a dequeue was not woken"
        for task in done:
            waiting.remove(task)
            claimed += [claim.rollout_id for claim in task.result()]
            waiting.append(asyncio.create_task(three.store.dequeue_many_rollouts(limit=2, timeout=60.0)))
    assert sorted(claimed) == sorted(ids)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_the_same_request_gets_the_same_claims(three: Three) -> None:
    await three.store.enqueue_many_rollouts(requests("a0", "a7", "a1", "a2"))
    first = await three.store.dequeue_many_rollouts(limit=3, worker_id="w", request_id="rq")
    again = await ShardedStore(three.shards).dequeue_many_rollouts(limit=3, worker_id="w", request_id="rq")
    assert {claim.attempt.attempt_id for claim in again} == {claim.attempt.attempt_id for claim in first}
    assert (await three.store.statistics())["queued"] == 1


async def test_a_wait_for_rollouts_ends_with_the_last_of_all_shards(three: Three) -> None:
    pairs = await started(three.store, "a0", "a1", "a2")
    ids = ["a2", "a0", "a1"]
    waiting = asyncio.create_task(three.store.wait_for_rollouts(rollout_ids=ids, timeout=60.0))
    for pair in pairs:
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await three.store.finish_attempt(*pair, "succeeded")
    assert [rollout.rollout_id for rollout in await asyncio.wait_for(waiting, 30.0)] == ids
    await three.store.enqueue_many_rollouts(requests("a3"))
    some = await three.store.wait_for_rollouts(rollout_ids=["a3", "a0"], timeout=0.05)
    assert [rollout.rollout_id for rollout in some] == ["a0"]
    with pytest.raises(StoreError, match="ro-none"):
        await three.store.wait_for_rollouts(rollout_ids=["a3", "ro-none"], timeout=60.0)


# --- shards that fail ---------------------------------------------------------------------------------------


async def test_a_dead_shard_is_named_and_the_others_go_on(three: Three, hasty: None) -> None:
    ok, _, lost = await started(three.store, "a0", "a1", "a2")
    three.shards[1].mode = "dead"
    with pytest.raises(InfrastructureError, match="shard 1 of 3: no process"):
        await three.store.finish_attempt(*lost, "succeeded")
    assert (await three.store.finish_attempt(*ok, "succeeded")).status == "succeeded"
    with pytest.raises(InfrastructureError, match="shard 1 of 3"):
        await three.store.query_rollouts()
    with pytest.raises(InfrastructureError, match="shard 1 of 3"):
        await three.store.dequeue_rollout("w", timeout=0.05)
    await three.store.enqueue_many_rollouts(requests("a7"))
    claim = await three.store.dequeue_rollout("w", timeout=60.0)
    assert claim is not None and claim.rollout_id == "a7"


async def test_a_silent_shard_holds_up_no_dequeue_and_no_heartbeat(three: Three, hasty: None) -> None:
    pairs = await started(three.store, "a0", "a2")
    three.shards[1].mode = "silent"
    await three.store.enqueue_many_rollouts(requests("a1"))
    claim = await asyncio.wait_for(three.store.dequeue_rollout("w", timeout=600.0), 30.0)
    assert claim is not None and claim.rollout_id == "a1"
    assert await asyncio.wait_for(three.store.dequeue_many_rollouts(limit=2, timeout=0.0), 30.0) == []
    await asyncio.wait_for(three.store.heartbeat("w", [*pairs, ("a7", "at-none")]), 30.0)
    worker = await three.store.update_worker("w", {"load": 1})
    assert worker.status == "busy"


async def test_a_claim_that_comes_late_is_not_lost(three: Three, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    await three.store.enqueue_many_rollouts(requests("a2"))
    gate = asyncio.Event()
    call = three.shards[1]._call

    async def slow(name: str, *args: Any, timeout: float | None = None) -> Any:
        answer = await call(name, *args, timeout=timeout)
        if name == "dequeue_many_rollouts" and answer:
            await gate.wait()
        return answer

    monkeypatch.setattr(three.shards[1], "_call", slow)
    assert await three.store.dequeue_rollout("w", timeout=0.05) is None
    gate.set()
    claim = await three.store.dequeue_rollout("w", timeout=60.0)
    assert claim is not None and claim.rollout_id == "a2"
    assert await three.store.dequeue_rollout("w") is None


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("mode", ["dead", "loses answers"])
async def test_what_failed_in_part_is_sent_again_and_counts_once(three: Three, mode: str, shard: int) -> None:
    ids = ["a0", "a1", "a2", "a3"]
    flaky = three.shards[shard]

    async def twice(call: Any) -> Any:
        flaky.mode = mode
        with pytest.raises(InfrastructureError, match=f"shard {shard} of 3"):
            await call()
        flaky.mode = "well"
        return await call()

    queued = await twice(lambda: three.store.enqueue_many_rollouts(requests(*ids)))
    assert [rollout.rollout_id for rollout in queued] == ids
    claims = await three.store.dequeue_many_rollouts(limit=9, worker_id="w", request_id="rq")
    assert sorted(claim.rollout_id for claim in claims) == ids
    pairs = [(claim.rollout_id, claim.attempt.attempt_id) for claim in claims]
    await twice(lambda: three.store.append_spans(batch(*pairs)))
    update = await twice(lambda: three.store.update_resources("r", {"llm": LLM(endpoint="e", model="m")}))
    assert update.version == 1
    ends = [Finish(*pair, "succeeded") for pair in pairs]
    ended = await twice(lambda: three.store.finish_many_attempts(ends, batch(*pairs, first=90)))
    assert [rollout.status for rollout in ended] == ["succeeded"] * 4
    assert (await three.store.statistics())["total_spans"] == 8
    gone = await twice(lambda: three.store.delete_rollouts(ids))
    assert set(gone) <= set(ids) and (await three.store.query_rollouts()).total == 0


async def test_a_dequeue_whose_answer_was_lost_gets_its_claims_when_it_is_sent_again(three: Three, hasty: None) -> None:
    await three.store.enqueue_many_rollouts(requests("a2"))
    three.shards[1].mode = "loses answers"
    with pytest.raises(InfrastructureError, match="shard 1 of 3"):
        await three.store.dequeue_many_rollouts(limit=1, worker_id="w", request_id="rq")
    three.shards[1].mode = "well"
    await three.store.enqueue_many_rollouts(requests("a0", "a1"))
    claims = await three.store.dequeue_many_rollouts(limit=1, worker_id="w", request_id="rq")
    assert [claim.rollout_id for claim in claims] in (["a0"], ["a1"], ["a2"])
    again = await three.store.dequeue_many_rollouts(limit=1, worker_id="w", request_id="rq")
    assert again == claims


async def test_resources_that_a_crash_kept_from_a_shard_are_there_when_a_rollout_names_them(three: Three) -> None:
    await three.store.update_resources("old", {"llm": LLM(endpoint="e", model="old")})
    three.shards[2].mode = "dead"
    with pytest.raises(InfrastructureError, match="shard 2 of 3"):
        await three.store.update_resources("new", {"llm": LLM(endpoint="e", model="new")})
    three.shards[2].mode = "well"
    latest = await three.store.get_latest_resources()
    assert latest is not None and latest.resources_id == "new"
    queued = await three.store.enqueue_many_rollouts(requests("a0", "a1", "a2"))
    assert [rollout.resources_id for rollout in queued] == ["new"] * 3
    with pytest.raises(StoreError, match="'never'"):
        await three.store.enqueue_many_rollouts(requests("a3", resources_id="never"))
    changed = await three.store.update_rollout("a1", resources_id="old")
    assert changed.resources_id == "old"


# --- on Ray -------------------------------------------------------------------------------------------------


async def load(store: Store, worker: int, acknowledged: dict[str, set[str]], enough: asyncio.Event) -> None:
    """Roll out without end, keeping account of what the store said it has."""
    number = 0
    while not enough.is_set():
        ids = [f"ro-{worker}-{number}-{part}" for part in range(4)]
        await store.enqueue_many_rollouts(requests(*ids))
        claims = await store.dequeue_many_rollouts(limit=4, worker_id=f"w{worker}", timeout=1.0)
        pairs = [(claim.rollout_id, claim.attempt.attempt_id) for claim in claims]
        await store.append_spans(batch(*pairs))
        await store.finish_many_attempts([Finish(*pair, "succeeded") for pair in pairs], batch(*pairs, first=10))
        for place, (rollout_id, _) in enumerate(pairs):
            acknowledged.setdefault(rollout_id, set()).update({f"s{place}", f"s{10 + place}"})
        acknowledged.update({each: acknowledged.get(each, set()) for each in ids})
        number += 1


async def test_a_shard_that_is_killed_under_load_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start_shards

    actors = start_shards(tmp_path, "killed", 3, lease_seconds=5.0)
    store = ShardedStore([StoreClient(actor) for actor in actors])
    acknowledged: dict[str, set[str]] = {}
    enough = asyncio.Event()
    work = [asyncio.create_task(load(store, worker, acknowledged, enough)) for worker in range(3)]
    for _ in range(2):
        before = len(acknowledged)
        while len(acknowledged) < before + 60:
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in work)
        os.kill(await actors[1].process_id.remote(), signal.SIGKILL)
    before = len(acknowledged)
    while len(acknowledged) < before + 60:
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in work)
    enough.set()
    await asyncio.wait_for(asyncio.gather(*work), 60.0)

    known = {rollout.rollout_id for rollout in await store.query_rollouts()}
    assert set(acknowledged) <= known
    for answer in (await store.scan_spans(sorted(known)), open_folder(tmp_path).scan_spans(sorted(known))):
        columns = (answer[name].to_pylist() for name in ("rollout_id", "attempt_id", "span_id"))
        rows = list(zip(*columns, strict=True))
        assert len(rows) == len(set(rows))
        found = {(rollout_id, span_id) for rollout_id, _, span_id in rows}
        assert {(each, span_id) for each, spans in acknowledged.items() for span_id in spans} <= found
    assert json.loads((tmp_path / "shards.json").read_text())["shards"] == 3
    await asyncio.gather(*(actor.close.remote() for actor in actors))
    for actor in actors:
        cluster.kill(actor)

    with pytest.raises(StoreError, match=r"has 3 shard\(s\)"):
        start_shards(tmp_path, "other", 2)
    shutil.rmtree(shard_folder(tmp_path, 2))
    with pytest.raises(InfrastructureError, match=r"shard 2 of 3 did not start .* is not on node"):
        start_shards(tmp_path, "gone", 3)


async def test_a_single_shard_is_a_plain_store(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start_shards

    [actor] = start_shards(tmp_path, "single", 1)
    await StoreClient(actor).enqueue_rollout(1)
    await actor.close.remote()
    cluster.kill(actor)
    assert not (tmp_path / "shards.json").exists() and open_folder(tmp_path).query_rollouts().total == 1
    with pytest.raises(StoreError, match=r"has 1 shard\(s\)"):
        start_shards(tmp_path, "many", 3)


async def test_new_rollouts_of_a_group_lie_in_one_shard_and_groups_in_all() -> None:
    store = ShardedStore([Flaky(None) for _ in range(4)])  # type: ignore[arg-type]
    ids = {group: [store.new_rollout_id(near=group) for _ in range(20)] for group in map(str, range(40))}
    assert len({rollout_id for group in ids.values() for rollout_id in group}) == 20 * 40
    for group, mine in ids.items():
        assert {shard_of(rollout_id, 4) for rollout_id in mine} == {shard_of(group, 4)}
    assert {shard_of(mine[0], 4) for mine in ids.values()} == {0, 1, 2, 3}
    assert len({shard_of(store.new_rollout_id(), 4) for _ in range(100)}) == 4
