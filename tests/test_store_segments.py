"""Segments: what was compacted answers as what was not, in less space, whatever happened meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_ray.errors import StoreError
from lightning_ray.store import LocalStoreClient, SpanStore, open_folder, spans_to_batch
from lightning_ray.store import compaction as compaction_module
from lightning_ray.store.manifest import manifest_path, segments_folder
from lightning_ray.store.snapshot import Rollouts
from lightning_ray.store.storage import Compaction
from lightning_ray.types import PromptTemplate
from tests.store_folders import BY_HAND, LOG_ONLY, batch, content, content_of, enqueue, run

IN_CHILD = Compaction(background=False, on_close=False, in_process_bytes=0)


def segments(folder: Path) -> list[Path]:
    return sorted(segments_folder(folder).glob("*.parquet"))


def compacted(store: SpanStore) -> None:
    """Compact, and check that nothing else has changed: in the store, in a view, and after opening it again."""
    before = content(store)
    store.storage.compact()
    assert content(store) == before
    assert content_of(store.folder) == before


def test_compacting_changes_no_answer(tmp_path: Path) -> None:
    store = SpanStore(tmp_path, compaction=IN_CHILD)
    store.update_resources("rs-1", {"prompt": PromptTemplate(template="{x}")})
    run(store, "done")
    run(store, "failed", status="failed")
    run(store, "live", status=None)
    enqueue(store, "queued-1", "queued-2")
    store.dequeue_many_rollouts(1, "w2", "rq-1")
    store.get_many_span_sequence_ids([("live", store.query_attempts("live")[0].attempt_id)])
    compacted(store)
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["00000002.log"]
    assert store.get_many_span_sequence_ids([("live", store.query_attempts("live")[0].attempt_id)])[0] > 3
    attempt = store.query_attempts("live")[0].attempt_id
    assert store.append_spans(batch("live", attempt, 4)) == [0, 1, 2]
    store.finish_many_attempts([("live", attempt, "succeeded", None)])
    compacted(store)
    assert store.scan_spans(["live"])["span_id"].to_pylist() == ["s0", "s1", "s2", "s3"]
    store.close()


def test_what_comes_late_reaches_rollouts_of_earlier_segments(tmp_path: Path) -> None:
    big = Compaction(background=False, on_close=False, in_process_bytes=2**40, segment_bytes=0)  # never merge
    store = SpanStore(tmp_path, compaction=big)
    attempts = {name: run(store, name) for name in ("a", "b", "c")}
    compacted(store)
    assert store.append_spans(batch("a", attempts["a"], 5, numbered=False)) == [0, 1, 2]
    store.update_rollout("b", {"metadata": {"seen": True}})
    store.update_attempt("b", attempts["b"], {"metadata": {"late": 1}})
    store.get_many_span_sequence_ids([("c", attempts["c"])])
    compacted(store)
    run(store, "d")
    compacted(store)
    assert len(segments(tmp_path)) == 3
    assert store.scan_spans(["a"])["sequence_id"].to_pylist() == [1, 2, 3, 4, 5]
    assert store.append_spans(batch("a", attempts["a"], 5)) == [0, 1, 2, 3, 4]
    store.close()
    before = content_of(tmp_path)
    SpanStore(tmp_path, compaction=LOG_ONLY).close()
    assert content_of(tmp_path) == before


def test_small_segments_are_merged(tmp_path: Path) -> None:
    for number in range(5):
        store = SpanStore(tmp_path)
        run(store, f"ro-{number}")
        store.close()
    assert len(segments(tmp_path)) == 1
    assert list((tmp_path / "log").iterdir()) == []
    assert [rollout.rollout_id for rollout in open_folder(tmp_path).query_rollouts()] == [f"ro-{n}" for n in range(5)]


def test_deleted_rollouts_leave_the_files(tmp_path: Path) -> None:
    store = SpanStore(tmp_path, compaction=BY_HAND)
    for name in ("a", "b", "c"):
        run(store, name)
    compacted(store)
    store.delete_rollouts(["b"])
    assert store.scan_spans(["a", "c"]).num_rows == 6
    assert open_folder(tmp_path).statistics()["spans"] == 6
    assert len(ds.dataset(segments(tmp_path)).to_table()) == 9
    tables = open_folder(tmp_path).span_dataset()
    compacted(store)
    assert sum(len(table) if isinstance(table, pa.Table) else table.count_rows() for table in tables) == 6
    assert len(ds.dataset(segments(tmp_path)).to_table()) == 6
    run(store, "b", spans=2)
    compacted(store)
    store.close()
    assert open_folder(tmp_path).scan_spans(["b"]).num_rows == 2


def test_rewriting_takes_deleted_rollouts_out_of_earlier_segments(tmp_path: Path) -> None:
    alone = Compaction(background=False, on_close=False, in_process_bytes=2**40, segment_bytes=0)
    store = SpanStore(tmp_path, compaction=alone)
    run(store, "a")
    run(store, "b", status=None)
    compacted(store)
    attempt = store.query_attempts("b")[0].attempt_id
    store.finish_many_attempts([("b", attempt, "succeeded", None)], batch("b", attempt, 6))
    compacted(store)
    run(store, "c")
    store.delete_rollouts(["b"])
    run(store, "b", spans=1)
    compacted(store)
    found = ds.dataset(segments(tmp_path)).to_table().group_by("rollout_id").aggregate([([], "count_all")])
    assert dict(zip(*found.to_pydict().values(), strict=True)) == {"a": 3, "c": 3, "b": 1}
    assert len(segments(tmp_path)) == 3
    store.close()


@pytest.mark.parametrize("by_service", [True, False])
async def test_what_was_deleted_is_off_the_disk_when_compacting_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_service: bool
) -> None:
    remove = compaction_module.remove_replaced

    def late(*given: Any) -> None:
        time.sleep(0.3)
        remove(*given)

    monkeypatch.setattr(compaction_module, "remove_replaced", late)
    store = SpanStore(tmp_path, compaction=BY_HAND)
    client = LocalStoreClient(store)
    run(store, "kept")
    run(store, "deleted")
    await client.compact()
    store.delete_rollouts(["deleted"])
    await client.compact() if by_service else store.storage.compact()
    assert set(ds.dataset(segments(tmp_path)).to_table()["rollout_id"].to_pylist()) == {"kept"}
    assert len(segments(tmp_path)) == 1
    await client.close()


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["run", "run", "live", "finish", "late", "late", "update", "delete", "reserve", "compact", "reopen"]
        ),
        st.integers(0, 5),
    ),
    max_size=25,
)


@given(actions=ACTIONS, merge=st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_any_history_reads_the_same_compacted(actions: list[tuple[str, int]], merge: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        how = Compaction(background=False, on_close=False, in_process_bytes=2**40, segment_bytes=2**30 if merge else 0)
        store = SpanStore(scratch, compaction=how)
        for number, (action, which) in enumerate(actions):
            _act(store, action, f"ro-{which}", number)
            if action == "compact":
                compacted(store)
            if action == "reopen":
                before = content(store)
                store.close()
                store = SpanStore(scratch, compaction=how)
                assert content(store) == before
        compacted(store)
        before = content(store)
        store.close()
        assert content_of(Path(scratch)) == before


def _act(store: SpanStore, action: str, rollout_id: str, number: int) -> None:
    known = store.get_rollout_by_id(rollout_id)
    if action in ("run", "live"):
        if known is None:
            run(store, rollout_id, status="succeeded" if action == "run" else None)
        return
    if known is None:
        return
    attempt = store.query_attempts(rollout_id)[-1].attempt_id
    if action == "finish":
        store.finish_many_attempts([(rollout_id, attempt, "failed", {"n": number})])
    elif action == "late":
        store.append_spans(batch(rollout_id, attempt, 2, first=number, numbered=number % 2 == 0))
    elif action == "update":
        store.update_rollout(rollout_id, {"metadata": {"n": number}})
    elif action == "delete":
        store.delete_rollouts([rollout_id])
    elif action == "reserve":
        store.get_many_span_sequence_ids([(rollout_id, attempt)])


def test_a_conversation_stores_its_prefix_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9), dtype=np.uint8)).decode() for _ in range(3000)]
    prompt = np.zeros(0, np.int32)
    messages: list[dict[str, str]] = []
    unique, spans = 0, []
    for turn in range(50):
        new, sampled = (rng.integers(0, 150_000, count, dtype=np.int32) for count in (450, 150))
        said, answer = (" ".join(rng.choice(words, 80)) for _ in range(2))
        prompt = np.concatenate([prompt, new])
        messages = [*messages, {"role": "user", "content": said}]
        logprobs = -rng.exponential(1, 150).astype(np.float32)
        spans.append(
            {
                "rollout_id": "ro-1",
                "sequence_id": turn + 1,
                "trace_id": "t",
                "span_id": f"s{turn}",
                "name": "chat",
                "prompt_ids": prompt,
                "sampled_ids": sampled,
                "logprobs": logprobs,
                "attributes": {"messages": messages},
            }
        )
        prompt = np.concatenate([prompt, sampled])
        messages = [*messages, {"role": "assistant", "content": answer}]
        unique += new.nbytes + sampled.nbytes + logprobs.nbytes + len(said) + len(answer)
    store = SpanStore(tmp_path)
    enqueue(store, "ro-1")
    attempt = store.dequeue_many_rollouts(1, "w")[0].attempt.attempt_id
    raw = 0
    for span in spans:
        one = spans_to_batch([{**span, "attempt_id": attempt}])
        raw += one.nbytes
        store.append_spans(one)
    store.finish_many_attempts([("ro-1", attempt, "succeeded", None)])
    store.close()
    assert store.notes == []
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert raw > 15 * unique
    assert stored < 1.1 * unique


def test_any_reader_of_parquet_opens_a_finished_folder(tmp_path: Path) -> None:
    store = SpanStore(tmp_path, fsync="none")
    for number in range(60):
        run(store, f"ro-{number}")
    store.close()
    assert pq.read_table(segments(tmp_path)[0]).num_rows == 180
    found = duckdb.sql(
        "SELECT count(*), sum(len(prompt_ids)), sum(prompt_ids[1]), sum(logprobs[1]), min(sequence_id) "
        f"FROM read_parquet('{segments_folder(tmp_path)}/*.parquet')"
    ).fetchall()
    assert found == [(180, 360, 180, 90.0, 1)]


def test_rows_are_found_among_many_row_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = SpanStore(tmp_path, compaction=BY_HAND)
    names = [f"ro-{number}" for number in range(40)]
    enqueue(store, *names)
    claims = store.dequeue_many_rollouts(40, "w")
    prompts = {}
    for step in range(5):
        prompts.update(
            {(claim.rollout_id, step): rng.integers(0, 9, rng.integers(1, 9000), dtype=np.int32) for claim in claims}
        )
        rows = [
            {
                "rollout_id": claim.rollout_id,
                "attempt_id": claim.attempt.attempt_id,
                "sequence_id": 0,
                "trace_id": "t",
                "span_id": f"s{step}",
                "name": "chat",
                "prompt_ids": prompts[claim.rollout_id, step],
            }
            for claim in claims
        ]
        store.append_spans(spans_to_batch(rows))
    store.storage.compact()
    assert pq.read_metadata(segments(tmp_path)[0]).num_row_groups > 5
    for wanted in (names, names[::-3], names[7:8]):
        found = store.scan_spans(wanted, columns=["rollout_id", "prompt_ids", "sequence_id"]).to_pylist()
        assert found == [
            {"rollout_id": name, "prompt_ids": prompts[name, step].tolist(), "sequence_id": step + 1}
            for name in wanted
            for step in range(5)
        ]
    first = claims[0]
    of_attempt = store.scan_spans([first.rollout_id], first.attempt.attempt_id, ["span_id"])
    assert of_attempt["span_id"].to_pylist() == [f"s{step}" for step in range(5)]
    assert store.scan_spans(["ro-1"], "latest").num_rows == 5
    store.close()


@pytest.mark.parametrize("point", ["child", "rename", "manifest", "remove"])
def test_a_writer_that_dies_while_it_compacts_leaves_a_whole_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    store = SpanStore(tmp_path, compaction=BY_HAND)
    for name in ("a", "b"):
        run(store, name)
    store.storage.compact()
    run(store, "c")
    before = content(store)

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    where = {"child": "compact", "rename": "sync_folder", "manifest": "write_manifest", "remove": "remove_replaced"}
    with monkeypatch.context() as patch:
        patch.setattr(compaction_module, where[point], die)
        patch.setattr(compaction_module, "discard", lambda task: None)
        with pytest.raises(StoreError if point == "remove" else KeyboardInterrupt, match=r"still there|^$"):
            store.storage.compact()
        shutil.copytree(tmp_path, tmp_path / "dead")
        store.storage.abandon()
    folder = tmp_path / "dead"
    assert content_of(folder) == before
    again = SpanStore(folder, compaction=BY_HAND)
    assert content(again) == before
    compacted(again)
    again.close()
    names = {path.name for path in segments_folder(folder).iterdir()}
    told = json.loads(manifest_path(folder).read_text())
    stems = told["segments"]
    assert names == {told["snapshot"], *(f"{stem}{end}" for stem in stems for end in (".parquet", ".rollouts"))}


def test_a_child_that_dies_is_noted_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SpanStore(tmp_path, compaction=Compaction(retry_seconds=0.0, on_close=False))
    run(store, "a")
    before = content(store)
    store.storage.begin_compaction()
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/bin/false")
        _maintain(store, lambda: bool(store.notes))
    assert "compaction" in store.notes[0]
    assert content(store) == before
    _maintain(store, lambda: bool(segments(tmp_path)) and not store.storage.index._logs)
    assert content(store) == before
    store.close()
    assert content_of(tmp_path) == before


def test_a_log_file_rests_before_it_is_compacted(tmp_path: Path) -> None:
    store = SpanStore(tmp_path, file_bytes=1, compaction=Compaction(on_close=False))
    run(store, "a")
    [*closed, last] = sorted((tmp_path / "log").glob("*.log"))
    store.maintain()
    assert store.storage._job is None
    for path in (*closed[:1], *closed[2:]):
        os.utime(path, (time.time() - 61, time.time() - 61))
    _maintain(store, lambda: bool(segments(tmp_path)) and not closed[0].exists())
    store.maintain()
    assert store.storage._job is None
    assert sorted((tmp_path / "log").glob("*.log")) == [*closed[1:], last]
    store.close()


def test_of_many_log_files_the_older_half_is_compacted_without_rest(tmp_path: Path) -> None:
    store = SpanStore(tmp_path, file_bytes=1, compaction=Compaction(on_close=False))
    for number in range(20):
        enqueue(store, f"ro-{number}")
    before = content(store)
    _maintain(store, lambda: len(list((tmp_path / "log").glob("*.log"))) <= 5)
    store.maintain()
    assert store.storage._job is None and content(store) == before
    store.close()


def _maintain(store: SpanStore, until: Any) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        store.maintain()
        time.sleep(0.02)


def test_a_store_on_whose_disk_compaction_fails_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SpanStore(tmp_path, compaction=BY_HAND)
    run(store, "a")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compaction_module, "write_segment", full)
        with pytest.raises(OSError, match="No space"):
            store.storage.compact()
    assert "No space" in store.notes[0]
    run(store, "b")
    compacted(store)
    store.close()


def test_a_view_reads_on_while_the_writer_compacts(tmp_path: Path) -> None:
    how = Compaction(background=False, on_close=False, in_process_bytes=2**40, segment_bytes=2**40)
    store = SpanStore(tmp_path, compaction=how)
    run(store, "a")
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            view = open_folder(tmp_path)
            while not done.is_set():
                fresh = open_folder(tmp_path)
                for one in (view, fresh):
                    assert one.scan_spans(["a"]).num_rows == 3
                    assert one.table().num_rows >= 3
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(25):
        run(store, f"ro-{number}")
        store.storage.compact()
        if number % 5 == 4:
            store.delete_rollouts([f"ro-{number}"])
    done.set()
    reader.join(timeout=60)
    assert failures == []
    store.close()


def test_a_missing_manifest_or_segment_is_an_error(tmp_path: Path) -> None:
    store = SpanStore(tmp_path / "whole")
    run(store, "a")
    store.close()
    for name in (
        "manifest.json",
        "segments/00000001-00000001.parquet",
        "segments/00000001-00000001.rollouts",
        "segments/00000001.state",
    ):
        folder = tmp_path / "broken"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / name).unlink()
        with pytest.raises(StoreError, match=Path(name).name):
            open_folder(folder)
        with pytest.raises(StoreError, match=Path(name).name):
            SpanStore(folder)
        shutil.rmtree(folder)


def test_rollouts_that_have_ended_are_packed_and_stay_changeable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ray.store.snapshot._UNPACKED_ROLLOUTS", 2)
    store = SpanStore(tmp_path, compaction=LOG_ONLY)
    names = [f"ro-{number}" for number in range(8)]
    for name in names:
        run(store, name)
    rollouts = store.state.rollouts
    assert isinstance(rollouts, Rollouts)
    assert sum(type(entry) is bytes for entry in dict.values(rollouts)) == 6
    for name in names:
        store.update_rollout(name, {"metadata": {"name": name}})
    assert [rollout.metadata for rollout in store.query_rollouts()] == [{"name": name} for name in names]
    assert list(rollouts) == names
    store.delete_rollouts(names[:7])
    run(store, names[0])
    assert [key for key, _ in rollouts.items()] == [names[7], names[0]]
    before = content(store)
    store.close()
    assert content_of(tmp_path) == before
