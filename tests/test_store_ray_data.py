"""Ray Data over a store's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from ray.data.expressions import col

from lightning_ray.errors import StoreError
from lightning_ray.own_ray import OwnRay
from lightning_ray.store.core import SpanStore
from lightning_ray.store.ray_data import read_dataset
from lightning_ray.store.schema import SPAN_SCHEMA, spans_to_batch
from lightning_ray.types import EnqueueRolloutRequest
from tests.test_store_sql import call


@pytest.fixture(scope="module")
def a_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    own = OwnRay.start(lambda _: {}, {"num_cpus": 2, "log_to_driver": False})
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    own.end()


def add(store: SpanStore, first: int, count: int) -> None:
    """Finished rollouts of three calls each."""
    ids = [f"r{number:03d}" for number in range(first, first + count)]
    store.enqueue_many_rollouts([EnqueueRolloutRequest(rollout_id=rollout_id, input=1) for rollout_id in ids])
    claims = store.dequeue_many_rollouts(count, "w", f"q{first}")
    pairs = [(claim.rollout_id, claim.attempt.attempt_id) for claim in claims]
    spans = [call(*pair, number) for pair in pairs for number in (1, 2, 3)]
    store.finish_many_attempts([(*pair, "succeeded", None) for pair in pairs], spans_to_batch(spans))


def keys(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return sorted((row["rollout_id"], row["sequence_id"]) for row in rows)


def test_a_store_at_work_is_read_with_its_tail(a_ray: None, tmp_path: Path) -> None:
    store = SpanStore(tmp_path)
    assert read_dataset(tmp_path).count() == 0
    add(store, 0, 20)
    assert read_dataset(tmp_path).count() == 60
    store.storage.compact()
    add(store, 20, 10)
    store.delete_rollouts(["r003", "r025"])
    spans = read_dataset(tmp_path)
    kept = [f"r{number:03d}" for number in range(30) if number not in (3, 25)]
    assert keys(spans.take_all()) == [(rollout_id, number) for rollout_id in kept for number in (1, 2, 3)]
    assert spans.filter(expr=col("sequence_id") > 2).count() == 28
    assert set(spans.schema().names) == set(SPAN_SCHEMA.names)
    few = read_dataset(tmp_path, ["sampled_ids", "agent"])
    assert few.take(1) == [{"sampled_ids": few.take(1)[0]["sampled_ids"], "agent": "planner"}] and few.count() == 84
    with pytest.raises(StoreError, match="no columns"):
        read_dataset(tmp_path, ["nonsense"])
    store.close()


def test_a_finished_run_is_parquet_to_anyone(a_ray: None, tmp_path: Path) -> None:
    store = SpanStore(tmp_path)
    add(store, 0, 20)
    store.storage.compact()
    store.close()
    spans = ray.data.read_parquet(str(tmp_path / "segments"))
    assert keys(spans.take_all()) == keys(read_dataset(tmp_path).take_all()) and spans.count() == 60
    assert spans.sum("sequence_id") == 120


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no span store"):
        read_dataset(tmp_path)
