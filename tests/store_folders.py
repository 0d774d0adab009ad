"""Small stores on disk for the tests of what lies there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_ray.store.core import SpanStore
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.store.storage import Compaction
from lightning_ray.store.view import StoreView, open_folder
from lightning_ray.types import EnqueueRolloutRequest

LOG_ONLY = Compaction(background=False, on_close=False)
BY_HAND = Compaction(background=False, on_close=False, in_process_bytes=2**40)
"""Compacts when it is told to, in this process."""


def batch(rollout_id: str, attempt_id: str, count: int, first: int = 0, numbered: bool = True) -> pa.RecordBatch:
    """Spans s0, s1, ... of an attempt; with their sequence ids or without."""
    return spans_to_batch(
        {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "sequence_id": number + 1 if numbered else 0,
            "trace_id": "t",
            "span_id": f"s{number}",
            "name": "call",
            "prompt_ids": [number, 7],
            "logprobs": [0.5],
            "attributes": {"n": number},
        }
        for number in range(first, first + count)
    )


def enqueue(store: SpanStore, *rollout_ids: str) -> None:
    store.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id=name, input={"q": name}) for name in rollout_ids])


def run(store: SpanStore, rollout_id: str, spans: int = 3, status: str | None = "succeeded") -> str:
    """Have a rollout's attempt record spans and end (None: not end); returns the attempt's id."""
    enqueue(store, rollout_id)
    attempt_id = store.dequeue_many_rollouts(1, "w")[0].attempt.attempt_id
    if spans > 1:
        store.append_spans(batch(rollout_id, attempt_id, spans - 1))
    last = batch(rollout_id, attempt_id, 1, spans - 1, numbered=False)
    if status is None:
        store.append_spans(last)
    else:
        store.finish_many_attempts([(rollout_id, attempt_id, status, None)], last)
    return attempt_id


def content(store: SpanStore | StoreView) -> dict[str, Any]:
    """All that a store answers, but for what depends on the time and the form on disk."""
    rollouts = store.query_rollouts().items
    ids = [rollout.rollout_id for rollout in rollouts]
    spans = store.scan_spans(ids)
    assert store.index.whole_table().sort_by("span_id").num_rows == spans.num_rows == store.statistics()["spans"]
    left_out = {"notes", "uptime", "disk_bytes", "name"}
    return {
        "rollouts": rollouts,
        "attempts": [store.query_attempts(rollout_id).items for rollout_id in ids],
        "spans": spans.to_pylist(),
        "workers": store.query_workers().items,
        "resources": store.query_resources().items,
        "latest": store.get_latest_resources(),
        "statistics": {key: value for key, value in store.statistics().items() if key not in left_out},
        "queue": list(store.state.queue),
        "live": {key: live.attempt.model_copy() for key, live in store.state.live.items()},
        "requests": dict(store.state.requests),
        "held": {worker: dict(held) for worker, held in store.state.by_worker.items()},
        "sequences": {key: entry.sequence for key, entry in store.state.rollouts.items()},
    }


def content_of(folder: Path) -> dict[str, Any]:
    return content(open_folder(folder))
