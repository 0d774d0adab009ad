"""A store that is killed at any moment stands where it stood: all it acknowledged, each thing once.

A real process writes under load, and compacts, in it and in its child process; it tells what was acknowledged
through a pipe, and is killed by SIGKILL. The next opens the same folder, checks, and goes on.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.store import SpanStore, open_folder
from lightning_ray.store.manifest import read_manifest, segments_folder
from lightning_ray.store.storage import Compaction
from lightning_ray.types import TERMINAL_ROLLOUT
from tests.store_folders import BY_HAND, batch, content, content_of, enqueue

KILLS = 36
FILE_BYTES = 48 * 2**10
Spans = dict[tuple[str, str], set[str]]


@dataclass
class Acknowledged:
    """What a store has told its writers that it has."""

    rollouts: set[str] = field(default_factory=set)
    attempts: set[tuple[str, str]] = field(default_factory=set)
    spans: Spans = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    going: set[str] = field(default_factory=set)
    """Rollouts whose deletion was asked for; they may be there or not."""

    def note(self, kind: str, *what: Any) -> None:
        if kind == "enqueued":
            self.rollouts.update(what[0])
        elif kind == "leased":
            self.attempts.update(what[0])
        elif kind == "spans":
            self.spans.setdefault((what[0], what[1]), set()).update(what[2])
        elif kind == "ended":
            assert self.ended.setdefault(what[0], what[1]) == what[1], f"{what[0]} ended twice"
        elif kind == "deleting":
            self.going.update(what[0])
        elif kind == "deleted":
            self.deleted.update(what[0])

    def check(self, store: Any) -> None:
        found = {rollout.rollout_id: rollout for rollout in store.query_rollouts()}
        assert not self.deleted & set(found)
        assert self.rollouts - self.going <= set(found)
        for rollout_id, attempt_id in self.attempts:
            if rollout_id not in self.going:
                assert attempt_id in {attempt.attempt_id for attempt in store.query_attempts(rollout_id)}
        for rollout_id, status in self.ended.items():
            if rollout_id not in self.going:
                assert found[rollout_id].status == status
        for rollout_id, rollout in found.items():
            attempts = store.query_attempts(rollout_id).items
            succeeded = sum(attempt.status == "succeeded" for attempt in attempts)
            assert succeeded == (rollout.status == "succeeded")
            if rollout.status in TERMINAL_ROLLOUT:
                assert all(attempt.end_time is not None for attempt in attempts)
        columns = ["rollout_id", "attempt_id", "span_id", "sequence_id"]
        table = store.scan_spans(list(found), columns=columns)
        assert store.index.spans == table.num_rows
        stored = Counter(zip(*(table[name].to_pylist() for name in columns[:3]), strict=True))
        assert set(stored.values()) <= {1}
        for (rollout_id, attempt_id), spans in self.spans.items():
            if rollout_id not in self.going:
                assert all((rollout_id, attempt_id, span_id) in stored for span_id in spans)
        numbers = Counter(zip(table["rollout_id"].to_pylist(), table["sequence_id"].to_pylist(), strict=True))
        assert set(numbers.values()) <= {1}


def write(folder: Path, seed: int, resend: list[tuple[str, str, int]], how: Compaction, pipe: Connection) -> None:
    """Write until killed: the load of some workers, each call told once it was acknowledged."""
    rng = random.Random(seed)
    store = SpanStore(folder, file_bytes=FILE_BYTES, compaction=how)
    pipe.send(("open",))
    for rollout_id, attempt_id, count in resend:
        if store.get_rollout_by_id(rollout_id) is not None:
            assert len(store.append_spans(batch(rollout_id, attempt_id, count, numbered=False))) == count
    at_work: dict[str, tuple[str, int]] = {
        rollout_id: (live.attempt.attempt_id, 1000 * (seed + 1)) for rollout_id, live in store.state.live.items()
    }
    for step in range(10**9):
        choice = rng.random()
        if choice < 0.1:
            ids = [f"ro-{seed}-{step}-{number}" for number in range(rng.randint(1, 4))]
            enqueue(store, *ids)
            pipe.send(("enqueued", ids))
        elif choice < 0.25:
            claims = store.dequeue_many_rollouts(rng.randint(1, 4), f"w-{seed}", f"rq-{seed}-{step}")
            at_work.update({claim.rollout_id: (claim.attempt.attempt_id, 0) for claim in claims})
            pipe.send(("leased", [(claim.rollout_id, claim.attempt.attempt_id) for claim in claims]))
        elif choice < 0.85 and at_work:
            rollout_id = rng.choice(list(at_work))
            attempt_id, first = at_work[rollout_id]
            count = rng.randint(1, 12)
            spans = batch(rollout_id, attempt_id, count, first, numbered=False)
            if rng.random() < 0.8:
                store.append_spans(spans)
                at_work[rollout_id] = attempt_id, first + count
            else:
                status = rng.choice(["succeeded", "succeeded", "failed"])
                rollout = store.finish_many_attempts([(rollout_id, attempt_id, status, None)], spans)[0]
                pipe.send(("ended", rollout_id, rollout.status))
                del at_work[rollout_id]
            pipe.send(("spans", rollout_id, attempt_id, spans["span_id"].to_pylist()))
        elif choice < 0.87:
            ended = [rollout.rollout_id for rollout in store.query_rollouts({"status_in": ["succeeded"]})]
            if ended:
                gone = [rng.choice(ended)]
                pipe.send(("deleting", gone))
                store.delete_rollouts(gone)
                pipe.send(("deleted", gone))
        elif choice < 0.92 and not how.background:
            store.storage.compact()
        store.maintain()


def _wait_for_a_commit(folder: Path) -> None:
    before, deadline = read_manifest(folder), time.monotonic() + 60
    while read_manifest(folder) == before and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("how", ["in the writer", "in a child"])
def test_a_store_killed_at_any_moment_has_all_it_acknowledged_once(tmp_path: Path, how: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(how)
    acknowledged, resend = Acknowledged(), list[tuple[str, str, int]]()
    in_child = Compaction(rest_seconds=0.0, segment_bytes=4 * FILE_BYTES, rewrite_seconds=0.0, retry_seconds=0.0)
    compaction = in_child if how == "in a child" else BY_HAND
    kills = KILLS // 4 if how == "in a child" else KILLS
    compactions = 0
    for kill in range(3 * kills):
        if kill >= kills and acknowledged.ended and acknowledged.deleted and compactions:
            break
        told, pipe = context.Pipe(duplex=False)
        process = context.Process(target=write, args=(tmp_path, kill, resend, compaction, pipe))
        process.start()
        pipe.close()
        assert told.poll(60), "the store did not open"
        started = told.recv()
        assert started == ("open",)
        if how == "in a child" and kill % 2:
            _wait_for_a_commit(tmp_path)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.join()
        first_of: dict[tuple[str, str], int] = {}
        while True:
            try:
                message = told.recv()
            except EOFError:
                break
            acknowledged.note(*message)
            if message[0] == "spans" and message[3][0] == "s0":
                first_of[message[1], message[2]] = len(message[3])
        resend = [(*ids, count) for ids, count in first_of.items()][:3]
        acknowledged.check(open_folder(tmp_path))
        compactions = max(compactions, len(list(segments_folder(tmp_path).glob("*.parquet"))))
    assert len(acknowledged.spans) > 20
    assert acknowledged.ended and acknowledged.deleted and compactions
    store = SpanStore(tmp_path)
    acknowledged.check(store)
    before = content(store)
    store.close()
    # The last kill may have hit amid a write: of what was not acknowledged, that is told and dropped.
    assert [note for note in store.notes if "of an unfinished record" not in note] == []
    assert list((tmp_path / "log").iterdir()) == []
    acknowledged.check(open_folder(tmp_path))
    assert content_of(tmp_path) == before
