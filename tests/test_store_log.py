"""The log and its replay: records survive whole or not at all, whatever a crash or a bad disk touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store import SpanStore, frames, open_folder
from lightning_ray.store.log import LogWriter, log_path, read_log
from lightning_ray.types import EnqueueRolloutRequest
from tests.store_folders import BY_HAND, LOG_ONLY, batch, content, content_of, enqueue, run


def finished(folder: Path, rollouts: int = 2, **settings: Any) -> tuple[list[str], int]:
    """A store in which each rollout has 2 spans, the last written with its end. Returns the ids, and the
    log's size before the last finish.
    """
    store = SpanStore(folder, **{"compaction": LOG_ONLY, **settings})
    ids = [f"ro-{index}" for index in range(rollouts)]
    enqueue(store, *ids)
    size = 0
    for claim in store.dequeue_many_rollouts(rollouts, "w"):
        store.append_spans(batch(claim.rollout_id, claim.attempt.attempt_id, 1))
        size = log_path(folder, 1).stat().st_size
        spans = batch(claim.rollout_id, claim.attempt.attempt_id, 1, first=1)
        store.finish_many_attempts([(claim.rollout_id, claim.attempt.attempt_id, "succeeded", None)], spans)
    store.close()
    return ids, size


def test_reopening_restores_everything(tmp_path: Path) -> None:
    ids, _ = finished(tmp_path)
    before = content_of(tmp_path)
    store = SpanStore(tmp_path, compaction=LOG_ONLY)
    assert store.notes == []
    assert store.scan_spans(ids).to_pylist() == before["spans"]
    store.close()
    assert content_of(tmp_path) == before
    assert {rollout.status for rollout in before["rollouts"]} == {"succeeded"}


def test_torn_tail_at_every_byte_of_the_last_record(tmp_path: Path) -> None:
    ids, last = finished(tmp_path)
    whole = content_of(tmp_path)
    path = log_path(tmp_path, 1)
    for cut in range(path.stat().st_size - 1, last - 1, -1):
        os.truncate(path, cut)
        view = open_folder(tmp_path)
        assert len(view.notes) == (cut != last)
        assert view.query_rollouts({"rollout_id_in": ids[:1]}).items == whole["rollouts"][:1]
        assert [rollout.status for rollout in view.query_rollouts()] == ["succeeded", "running"]
        assert view.scan_spans(ids)["span_id"].to_pylist() == ["s0", "s1", "s0"]


@pytest.mark.parametrize("left", [0, 1, 23, 24, 200, 1000])
def test_a_store_with_a_torn_tail_goes_on(tmp_path: Path, left: int) -> None:
    ids, last = finished(tmp_path)
    os.truncate(log_path(tmp_path, 1), last + left)
    store = SpanStore(tmp_path)
    assert len(store.notes) == (left != 0)
    attempt = store.query_attempts(ids[1])[0].attempt_id
    store.finish_many_attempts([(ids[1], attempt, "succeeded", None)], batch(ids[1], attempt, 2))
    store.close()
    view = open_folder(tmp_path)
    assert view.notes == []
    assert view.scan_spans(ids)["span_id"].to_pylist() == ["s0", "s1", "s0", "s1"]


def test_flipped_byte_in_the_last_record_drops_just_it(tmp_path: Path) -> None:
    _, last = finished(tmp_path / "whole")
    data = log_path(tmp_path / "whole", 1).read_bytes()
    for position in range(last, len(data) - 8, 7):
        folder = tmp_path / "flipped"
        shutil.copytree(tmp_path / "whole", folder)
        log_path(folder, 1).write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        view = open_folder(folder)
        assert len(view.notes) == 1
        assert view.statistics()["spans"] == 3
        shutil.rmtree(folder)


def test_damage_to_an_acknowledged_record_is_an_error(tmp_path: Path) -> None:
    _, last = finished(tmp_path, rollouts=3)
    path = log_path(tmp_path, 1)
    whole = path.read_bytes()
    for position in range(40, last // 2, 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(StoreError, match=r"damaged.*truncate"):
            open_folder(tmp_path)
        with pytest.raises(StoreError, match="damaged"):
            SpanStore(tmp_path)
    assert path.stat().st_size == len(whole)


def test_a_hole_before_unsynced_records_is_a_torn_tail(tmp_path: Path) -> None:
    """After a power loss a later page may be on disk and an earlier one not; neither was acknowledged."""
    writer = LogWriter(tmp_path, "group", 2**20)
    writer.append([{"n": 1}])
    writer.sync()
    path = log_path(tmp_path, 1)
    hole = path.stat().st_size
    writer.append([{"n": 2}])
    writer.append([{"n": 3}])
    data = path.read_bytes()
    path.write_bytes(data[:hole] + bytes(8) + data[hole + 8 :])
    notes: list[str] = []
    assert [record.events for record in read_log(tmp_path, notes, repair=True)] == [[{"n": 1}]]
    assert len(notes) == 1
    assert path.stat().st_size == hole


def test_files_rotate_and_replay_in_order(tmp_path: Path) -> None:
    ids, _ = finished(tmp_path, rollouts=20, file_bytes=4096)
    assert len(list((tmp_path / "log").iterdir())) > 3
    assert open_folder(tmp_path).scan_spans(ids).num_rows == 40
    assert open_folder(tmp_path).table().num_rows == 40
    store = SpanStore(tmp_path, file_bytes=4096)
    assert [rollout.rollout_id for rollout in store.query_rollouts({"status_in": ["succeeded"]})] == ids
    store.close()


def test_damage_in_a_rotated_file_is_an_error(tmp_path: Path) -> None:
    finished(tmp_path, rollouts=20, file_bytes=4096)
    path = log_path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StoreError, match="damaged"):
        open_folder(tmp_path)


@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_file_is_an_error(tmp_path: Path, number: int) -> None:
    finished(tmp_path, rollouts=20, file_bytes=4096)
    log_path(tmp_path, number).unlink()
    with pytest.raises(StoreError, match=rf"0000000{number}\.log.*missing"):
        open_folder(tmp_path)


def test_a_crash_while_a_file_is_started(tmp_path: Path) -> None:
    finished(tmp_path)
    log_path(tmp_path, 2).write_bytes(b"\x01\x02\x03")
    store = SpanStore(tmp_path)
    store.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id="ro-x", input=1)])
    store.close()
    assert open_folder(tmp_path).statistics()["rollouts"] == 3


def test_without_fsync_records_survive_the_process(tmp_path: Path) -> None:
    finished(tmp_path, fsync="none")
    assert open_folder(tmp_path).statistics()["rollouts_by_status"] == {"succeeded": 2}


def test_a_second_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ray.store.core._LOCK_SECONDS", 0.1)
    store = SpanStore(tmp_path)
    with pytest.raises(StoreError, match="another process"):
        SpanStore(tmp_path)
    store.close()
    SpanStore(tmp_path).close()


def test_a_full_disk_stops_the_store_and_loses_nothing_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SpanStore(tmp_path)
    enqueue(store, "ro-1")

    def full(fd: int, buffers: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.writev", full)
        with pytest.raises(InfrastructureError, match="No space left"):
            enqueue(store, "ro-2")
    with pytest.raises(InfrastructureError, match="No space left"):
        enqueue(store, "ro-3")
    store.close()
    assert [rollout.rollout_id for rollout in open_folder(tmp_path).query_rollouts()] == ["ro-1"]


def test_a_folder_without_a_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=str(tmp_path)):
        open_folder(tmp_path)


class Whole:
    """A store with segments and a log, and what it held behind each of the log's records."""

    def __init__(self, folder: Path, states: list[dict[str, Any]]) -> None:
        self.folder, self.states = folder, states


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    store = SpanStore(folder, compaction=BY_HAND)
    for number in range(6):
        run(store, f"ro-{number}", status=None if number == 2 else "succeeded")
    store.storage.compact()
    states = [content(store)]
    store.observe = lambda events: states.append(content(store))
    for number in range(6, 9):
        run(store, f"ro-{number}")
    store.delete_rollouts(["ro-1", "ro-7"])
    store.close()
    return Whole(folder, states)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_byte_is_lost_nothing_acknowledged_is_lost_silently(whole: Whole, data: st.DataObject) -> None:
    """Either a prefix of the records is read and the loss is told, or an error names the file."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "store"
        shutil.copytree(whole.folder, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
        path = data.draw(st.sampled_from(files), "file")
        content_before = path.read_bytes()
        position = data.draw(st.integers(0, len(content_before) - 1), "position")
        if data.draw(st.booleans(), "cut"):
            path.write_bytes(content_before[:position])
        else:
            flip = 1 << data.draw(st.integers(0, 7), "bit")
            changed = bytes([content_before[position] ^ flip])
            path.write_bytes(content_before[:position] + changed + content_before[position + 1 :])
        try:
            view = open_folder(folder)
            read = content(view)
        except StoreError as error:
            assert path.name in str(error) or path.stem in str(error)
            return
        if read != whole.states[-1]:
            assert path.suffix == ".log"
            assert any(read == state for state in whole.states)
            assert len(view.notes) == 1 or position in _record_ends(whole.folder)


def _record_ends(folder: Path) -> set[int]:
    data = [memoryview(path.read_bytes()) for path in (folder / "log").iterdir()]
    return {0} | {frame.end for log in data for frame in frames.frames(log)}
