"""Which shard has a rollout, how a call's arguments are divided among shards, and how answers become one again.

A rollout is in the shard that its id gives, for ever, with all its attempts and spans. Pure functions, shared
by the client of live shards and the view of their folders; asking the shards is theirs.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.store.query import Page, select
from lightning_ray.types import PaginatedResult, Rollout, Worker

HOME = 0
"""The shard that numbers and answers resources."""

_TIMES = ("last_heartbeat_time", "last_dequeue_time", "last_busy_time", "last_idle_time")


def shard_of(rollout_id: str, shards: int) -> int:
    """The number of the shard that has a rollout: CRC-32 of its id in UTF-8, modulo the number of shards."""
    return crc32(rollout_id.encode()) % shards


def by_shard(rollout_ids: Iterable[str], shards: int) -> dict[int, list[int]]:
    """The positions of the ids by shard, in their order."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, rollout_id in enumerate(rollout_ids):
        places[shard_of(rollout_id, shards)].append(place)
    return dict(places)


def rows_by_shard(batch: pa.RecordBatch, shards: int) -> dict[int, pa.Array]:
    """The rows of a batch of spans by shard, in their order."""
    ids = batch.column("rollout_id").dictionary_encode()
    owner = pa.array([shard_of(rollout_id, shards) for rollout_id in ids.dictionary.to_pylist()], pa.int32())
    owners = owner.take(ids.indices)
    return {shard: pc.indices_nonzero(pc.equal(owners, shard)) for shard in sorted(set(owner.to_pylist()))}


def in_order(tables: Sequence[pa.Table], rollout_ids: Iterable[str]) -> pa.Table:
    """Spans of several shards, one rollout after the other in the order of the ids. Each table must have its
    rollouts' rows together.
    """
    pieces: dict[str, pa.Table] = {}
    for table in tables:
        counted = pc.value_counts(table["rollout_id"])
        counts = counted.field("counts").to_pylist()
        for rollout_id, end, count in zip(counted.field("values").to_pylist(), accumulate(counts), counts, strict=True):
            pieces[rollout_id] = table.slice(end - count, count)
    ordered = [pieces[rollout_id] for rollout_id in dict.fromkeys(rollout_ids) if rollout_id in pieces]
    return pa.concat_tables(ordered) if ordered else tables[0].slice(0, 0)


def first_rows(page: Page) -> Page:
    """What each shard is asked for, so that the page can be cut from the merged answers."""
    return page._replace(limit=page.limit if page.limit < 0 else page.offset + page.limit, offset=0)


def merge_rollouts(answers: Sequence[PaginatedResult[Rollout]], page: Page) -> PaginatedResult[Rollout]:
    """A page of all shards' rollouts, out of each shard's first rows.

    Unsorted they are in order of ``start_time``, and each shard's own order is kept.
    """
    created = attrgetter("start_time")
    if page.sort_by is None:
        merged = list(heapq.merge(*(answer.items for answer in answers), key=created))
    else:
        merged = sorted((rollout for answer in answers for rollout in answer.items), key=created)
    cut = select(merged, Rollout, {}, page)
    return cut.model_copy(update={"total": sum(answer.total for answer in answers)})


def merge_workers(answers: Iterable[Iterable[Worker]]) -> list[Worker]:
    """All shards' workers, each once."""
    seen: defaultdict[str, list[Worker]] = defaultdict(list)
    for answer in answers:
        for worker in answer:
            seen[worker.worker_id].append(worker)
    return [merge_worker(same) for same in seen.values()]


def merge_worker(same: Sequence[Worker]) -> Worker:
    """One worker as several shards saw it: busy if it is anywhere, else as the shard says that had it last; the
    newest of each time; the newest heartbeat's statistics.
    """
    busy = [worker for worker in same if worker.status == "busy"]
    last = max(busy or same, key=_last_at_work)
    beats = [worker for worker in same if worker.heartbeat_stats is not None]
    newest = max(beats, key=lambda worker: worker.last_heartbeat_time or 0.0, default=last)
    times = {name: max(filter(None, map(attrgetter(name), same)), default=None) for name in _TIMES}
    return last.model_copy(update={**times, "heartbeat_stats": newest.heartbeat_stats})


def merge_statistics(answers: Sequence[dict[str, Any]], workers: Sequence[Worker]) -> dict[str, Any]:
    """Counts and sizes summed, lists joined, the longest time up, all else as the home says; a worker of several
    shards counts once, and so do resources.
    """
    busy = sum(worker.status == "busy" for worker in workers)
    counts = {"total_workers": len(workers), "workers": busy, "total_resources": answers[HOME]["total_resources"]}
    summed: dict[str, Any] = {}
    for answer in answers:
        summed = _sum_maps(summed, answer)
    return {**summed, **counts}


def merge_tables(answers: Sequence[Mapping[str, pa.Table]]) -> dict[str, pa.Table]:
    """The tables that SQL sees, of all shards: resources as the home has them, workers merged (with all their
    columns).
    """
    merged = {}
    for name, table in answers[HOME].items():
        tables = [answer[name] for answer in answers]
        if name == "workers":
            rows = ((Worker.model_construct(**row) for row in table.to_pylist()) for table in tables)
            merged[name] = pa.Table.from_pylist([dict(worker) for worker in merge_workers(rows)], schema=table.schema)
        else:
            merged[name] = table if name == "resources" else pa.concat_tables(tables)
    return merged


def _sum_maps(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {key: _sum(key, one.get(key), other.get(key)) for key in {**one, **other}}


def _sum(key: str, one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict):
        return _sum_maps(one, other)
    if isinstance(one, (str, bool)):
        return one
    return max(one, other) if key.startswith("uptime") else one + other


def _last_at_work(worker: Worker) -> float:
    return max(worker.last_busy_time or 0.0, worker.last_idle_time or 0.0, worker.last_dequeue_time or 0.0)
