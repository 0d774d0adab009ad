"""Filtering, sorting and paging against the plain way of doing it, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import StoreError
from lightning_ray.store.query import Page, choose, select
from lightning_ray.types import Rollout, Span, Worker

WORKERS = st.lists(
    st.builds(
        Worker,
        worker_id=st.text("abc", max_size=3),
        status=st.sampled_from(["idle", "busy", "unknown"]),
        last_busy_time=st.none() | st.floats(0.0, 3.0),
    ),
    max_size=12,
)


@given(
    WORKERS,
    st.sampled_from([None, "worker_id", "last_busy_time", "status"]),
    st.booleans(),
    st.integers(-1, 6),
    st.integers(0, 6),
)
def test_sorting_and_paging(
    workers: list[Worker], sort_by: str | None, descending: bool, limit: int, offset: int
) -> None:
    found = select(workers, Worker, {}, Page(sort_by, "desc" if descending else "asc", limit, offset))
    expected = list(workers)
    if sort_by is not None:
        known = [worker for worker in workers if getattr(worker, sort_by) is not None]
        expected = sorted(known, key=lambda worker: getattr(worker, sort_by), reverse=descending)
        expected += [worker for worker in workers if getattr(worker, sort_by) is None]
    expected = expected[offset:] if limit < 0 else expected[offset : offset + limit]
    assert [id(worker) for worker in found] == [id(worker) for worker in expected]
    assert (found.total, found.limit, found.offset) == (len(workers), limit, offset)


@given(WORKERS, st.lists(st.sampled_from(["idle", "busy"])), st.text("abc", max_size=2), st.sampled_from(["and", "or"]))
def test_filters(workers: list[Worker], statuses: list[str], part: str, logic: str) -> None:
    where = {"status_in": statuses, "worker_id_contains": part, "worker_id": None, "filter_logic": logic}
    join = all if logic == "and" else any
    expected = [worker for worker in workers if join([worker.status in statuses, part in worker.worker_id])]
    assert list(select(workers, Worker, where, Page())) == expected
    page = Page(limit=2, offset=1)
    assert choose(workers, Worker, where, page, total=len(expected)) == (expected[1:3], len(expected))


def test_no_filter_passes_all_whatever_the_logic() -> None:
    workers = [Worker(worker_id="w")]
    assert list(select(workers, Worker, {"filter_logic": "or"}, Page())) == workers


def test_a_short_page_of_many_looks_at_few() -> None:
    looked = []

    class Many(list[Worker]):
        def __iter__(self) -> Any:
            for item in super().__iter__():
                looked.append(item)
                yield item

    workers = Many(Worker(worker_id=str(number)) for number in range(1000))
    assert select(workers, Worker, {}, Page(limit=3, offset=2)).total == 1000
    assert len(looked) <= 5
    choose(workers, Worker, {"status_in": ["unknown"]}, Page(limit=3), total=1000)
    assert len(looked) <= 9


@pytest.mark.parametrize(
    ("model", "where", "page", "named"),
    [
        (Worker, {"colour": "red"}, Page(), "colour"),
        (Worker, {"colour_in": ["red"]}, Page(), "colour"),
        (Worker, {"heartbeat_stats_contains": "x"}, Page(), "heartbeat_stats"),
        (Worker, {"status_in": "idle"}, Page(), "status_in"),
        (Worker, {"filter_logic": "xor"}, Page(), "xor"),
        (Worker, {}, Page(sort_by="heartbeat_stats"), "heartbeat_stats"),
        (Rollout, {}, Page(sort_by="input"), "input"),
        (Rollout, {}, Page(sort_by="config"), "config"),
        (Span, {}, Page(sort_by="attributes"), "attributes"),
        (Worker, {}, Page(sort_order="up"), "up"),  # type: ignore[arg-type]
        (Worker, {}, Page(offset=-1), "-1"),
    ],
)
def test_what_cannot_be_asked_is_named(model: Any, where: dict[str, Any], page: Page, named: str) -> None:
    with pytest.raises(StoreError, match=named):
        select([], model, where, page)
