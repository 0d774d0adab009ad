"""N stores as one: each rollout lives in the shard that its id gives, and calls are routed, split and merged.

The calls on one rollout keep all the store's promises. A call on several shards is done in each of them or not,
shard by shard: ``finish_many_attempts`` is all or nothing within a shard only. If a part of it fails, the error
names the shard, the other parts stand, and sending the whole call again is always right.

Resources live in shard 0, the home, which alone numbers and answers them; the other shards hold copies only to know
the ids that rollouts name. A copy that a crash left out is made up for when a rollout names it, or on a resend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from lightning_ray.errors import InfrastructureError, StoreError
from lightning_ray.store.base import Store
from lightning_ray.store.query import Page, select
from lightning_ray.store.schema import decode_batch, encode_batch
from lightning_ray.store.shard_merge import (
    HOME,
    by_shard,
    first_rows,
    in_order,
    merge_rollouts,
    merge_statistics,
    merge_tables,
    merge_worker,
    merge_workers,
    rows_by_shard,
    shard_of,
)
from lightning_ray.store.shard_queue import PATIENCE_SECONDS, ShardQueue, patiently
from lightning_ray.store.sql import columns_needed, sql_over_tables
from lightning_ray.types import (
    AttemptedRollout,
    EnqueueRolloutRequest,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    Worker,
)


class ShardedStore(Store):
    """One client of several stores (StoreClients, LocalStoreClients, ...); picklable if they are.

    Their order and number belong to the run: the same on each opening.
    """

    def __init__(self, shards: Sequence[Store]) -> None:
        if not shards:
            raise StoreError("a ShardedStore got no shards; give it at least one store")
        self.shards = tuple(shards)
        self._queue = ShardQueue(self._ask, len(self.shards))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedStore, (self.shards,)

    @property
    def actors(self) -> list[Any]:
        return [actor for shard in self.shards for actor in shard.actors]

    def new_rollout_id(self, near: str | None = None) -> str:
        rollout_id = super().new_rollout_id()
        while near is not None and self._shard(rollout_id) != self._shard(near):
            rollout_id = super().new_rollout_id()
        return rollout_id

    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        timeout: float = 0.0,
        request_id: str | None = None,
    ) -> list[AttemptedRollout]:
        """Lease up to ``limit`` rollouts, oldest first within a shard, the shards in turn.

        Waits as one store does. A shard that is silent for some seconds is gone without.
        """
        if limit > 0 and request_id is not None and (claims := await self._queue.claimed(worker_id, request_id)):
            return claims
        return await super().dequeue_many_rollouts(
            limit=limit, worker_id=worker_id, timeout=timeout, request_id=request_id
        )

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        if name in _OF_THE_ROLLOUT:
            return await self._ask(self._shard(args[0]), name, *args)
        if name in _OF_THE_HOME:
            return await self._ask(HOME, name, *args)
        if name in _WAITING:
            return await getattr(self, f"_{name}")(*args, timeout=timeout or 0.0)
        if name in _MERGED:
            return await getattr(self, f"_{name}")(*args)
        raise StoreError(f"the store has no call {name!r}")

    # --- asking the shards ----------------------------------------------------------------------------------

    def _shard(self, rollout_id: str) -> int:
        return shard_of(rollout_id, len(self.shards))

    async def _ask(self, shard: int, name: str, *args: Any, timeout: float | None = None) -> Any:
        try:
            return await self.shards[shard]._call(name, *args, timeout=timeout)
        except InfrastructureError as error:
            raise InfrastructureError(f"shard {shard} of {len(self.shards)}: {error}") from error

    async def _ask_some(self, name: str, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """The answers by shard. All are waited for, also when one fails."""
        asked = [self._ask(shard, name, *args) for shard, args in calls.items()]
        return _answers(calls, await asyncio.gather(*asked, return_exceptions=True))

    async def _ask_all(self, name: str, *args: Any) -> list[Any]:
        return list((await self._ask_some(name, dict.fromkeys(range(len(self.shards)), args))).values())

    async def _ask_split(
        self, name: str, items: Sequence[Any], id_of: Callable[[Any], str], *args: Any
    ) -> list[list[Any]]:
        """Each item's shard is asked for its items; returns answers and their places, see ``_placed``."""
        places = by_shard(map(id_of, items), len(self.shards))
        calls = {shard: ([items[place] for place in mine], *args) for shard, mine in places.items()}
        answers = await self._ask_some(name, calls)
        return [[places[shard], answers[shard]] for shard in places]

    async def _ask_patiently(self, name: str, calls: Mapping[int, tuple[Any, ...]]) -> list[Any]:
        """The answers of the shards that are not silent: what concerns the others must not wait for one."""
        asked = {shard: self._ask(shard, name, *args) for shard, args in calls.items()}
        answers, errors = await patiently(asked, PATIENCE_SECONDS)
        _answers(errors, list(errors.values()))
        return list(answers.values())

    # --- rollouts -------------------------------------------------------------------------------------------

    async def _enqueue_many_rollouts(self, requests: list[EnqueueRolloutRequest]) -> list[Rollout]:
        requests = await self._with_resources(requests)
        places = by_shard((str(request.rollout_id) for request in requests), len(self.shards))

        async def enqueue(shard: int, mine: list[EnqueueRolloutRequest]) -> list[Rollout]:
            named = (request.resources_id for request in mine)
            return await self._ask_with_copies(shard, named, "enqueue_many_rollouts", mine)

        work = [enqueue(shard, [requests[place] for place in mine]) for shard, mine in places.items()]
        answers = _answers(places, await asyncio.gather(*work, return_exceptions=True))
        return _placed([[places[shard], answers[shard]] for shard in places])

    async def _start_rollout(
        self, request: EnqueueRolloutRequest, attempt_id: str, worker_id: str | None
    ) -> AttemptedRollout:
        [request] = await self._with_resources([request])
        shard = self._shard(str(request.rollout_id))
        return await self._ask_with_copies(
            shard, [request.resources_id], "start_rollout", request, attempt_id, worker_id
        )

    async def _update_rollout(self, rollout_id: str, changes: dict[str, Any]) -> Rollout:
        shard, named = self._shard(rollout_id), [changes.get("resources_id")]
        return await self._ask_with_copies(shard, named, "update_rollout", rollout_id, changes)

    async def _dequeue_many_rollouts(
        self, limit: int, worker_id: str | None, request_id: str, timeout: float
    ) -> list[AttemptedRollout]:
        return await self._queue.claim(limit, worker_id, request_id, timeout)

    async def _wait_for_queue(self, timeout: float) -> bool:
        calls = {shard: self._ask(shard, "wait_for_queue", timeout=timeout) for shard in range(len(self.shards))}
        answers, errors = await patiently(calls, timeout + PATIENCE_SECONDS, until=bool)
        if not any(answers.values()):
            _answers(errors, list(errors.values()))
        return any(answers.values())

    async def _wait_for_rollouts(self, rollout_ids: list[str], timeout: float) -> list[Rollout]:
        places = by_shard(rollout_ids, len(self.shards))
        calls = [
            self._ask(shard, "wait_for_rollouts", [rollout_ids[place] for place in mine], timeout=timeout)
            for shard, mine in places.items()
        ]
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            ended = {rollout.rollout_id: rollout for answer in await asyncio.gather(*tasks) for rollout in answer}
        finally:
            for task in tasks:
                task.cancel()
        return [ended[rollout_id] for rollout_id in dict.fromkeys(rollout_ids) if rollout_id in ended]

    async def _finish_many_attempts(
        self, finishes: list[tuple[str, str, str, dict[str, Any] | None]], encoded: pa.Buffer | None
    ) -> list[Rollout]:
        places = by_shard((finish[0] for finish in finishes), len(self.shards))
        bodies = self._split_spans(encoded)
        if strange := bodies.keys() - places.keys():
            rollout_id = decode_batch(bodies[min(strange)][0]).column("rollout_id")[0].as_py()
            raise StoreError(
                f"finish_many_attempts came with spans of a rollout that it does not name, {rollout_id!r}; send those "
                "with add_many_spans"
            )
        calls = {
            shard: ([finishes[place] for place in mine], bodies[shard][0] if shard in bodies else None)
            for shard, mine in places.items()
        }
        answers = await self._ask_some("finish_many_attempts", calls)
        return _placed([[places[shard], answers[shard]] for shard in places])

    async def _delete_rollouts(self, rollout_ids: list[str]) -> list[str]:
        answers = await self._ask_split("delete_rollouts", rollout_ids, str)
        gone = {rollout_id for _, answer in answers for rollout_id in answer}
        return [rollout_id for rollout_id in dict.fromkeys(rollout_ids) if rollout_id in gone]

    async def _query_rollouts(self, where: dict[str, Any], page: Page) -> PaginatedResult[Rollout]:
        asked = first_rows(page)
        calls = {shard: (where, asked) for shard in range(len(self.shards))}
        if "rollout_id_in" in where and where.get("filter_logic", "and") == "and":
            ids = where["rollout_id_in"]
            places = by_shard(ids, len(self.shards)) or {HOME: []}
            calls = {
                shard: ({**where, "rollout_id_in": [ids[place] for place in mine]}, asked)
                for shard, mine in places.items()
            }
        return merge_rollouts(list((await self._ask_some("query_rollouts", calls)).values()), page)

    # --- workers --------------------------------------------------------------------------------------------

    async def _heartbeat(self, worker_id: str, attempts: list[tuple[str, str]]) -> list[tuple[str, str]]:
        places = by_shard((rollout_id for rollout_id, _ in attempts), len(self.shards))
        calls = {
            shard: (worker_id, [attempts[place] for place in places.get(shard, [])])
            for shard in range(len(self.shards))
        }
        stop = {tuple(pair) for answer in await self._ask_patiently("heartbeat", calls) for pair in answer}
        return [pair for pair in attempts if pair in stop]

    async def _update_worker(self, worker_id: str, stats: dict[str, Any] | None) -> Worker:
        calls = dict.fromkeys(range(len(self.shards)), (worker_id, stats))
        return merge_worker(await self._ask_patiently("update_worker", calls))

    async def _release_worker(self, worker_id: str, reason: str) -> list[str]:
        self._queue.release(worker_id)
        answers = await self._ask_all("release_worker", worker_id, reason)
        return sorted(rollout_id for answer in answers for rollout_id in answer)

    async def _get_worker_by_id(self, worker_id: str) -> Worker | None:
        seen = [worker for worker in await self._ask_all("get_worker_by_id", worker_id) if worker is not None]
        return merge_worker(seen) if seen else None

    async def _query_workers(self, where: dict[str, Any], page: Page) -> PaginatedResult[Worker]:
        return select(await self._workers(), Worker, where, page)

    async def _workers(self) -> list[Worker]:
        return merge_workers(await self._ask_all("query_workers", {}, Page()))

    # --- spans ----------------------------------------------------------------------------------------------

    async def _append_spans(self, encoded: pa.Buffer, *synced: bool) -> list[int]:
        bodies = self._split_spans(encoded)
        answers = await self._ask_some("append_spans", {shard: (body, *synced) for shard, (body, _) in bodies.items()})
        return sorted(bodies[shard][1][row] for shard, left_out in answers.items() for row in left_out)

    async def _get_many_span_sequence_ids(self, pairs: list[tuple[str, str]]) -> list[int]:
        return _placed(await self._ask_split("get_many_span_sequence_ids", pairs, lambda pair: pair[0]))

    async def _scan_spans(self, rollout_ids: list[str], attempt_id: str | None, columns: list[str] | None) -> pa.Table:
        if len(set(rollout_ids)) > 1 and attempt_id not in (None, "latest"):  # other shards would refuse it
            rollout_ids = await self._with_attempt(rollout_ids, attempt_id) or rollout_ids
        if len({*map(self._shard, rollout_ids)}) < 2:
            shard = self._shard(rollout_ids[0]) if rollout_ids else HOME
            return await self._ask(shard, "scan_spans", rollout_ids, attempt_id, columns)
        wanted = columns if columns is None or "rollout_id" in columns else [*columns, "rollout_id"]
        answers = await self._ask_split("scan_spans", rollout_ids, str, attempt_id, wanted)
        spans = in_order([answer for _, answer in answers], rollout_ids)
        return spans if columns is None else spans.select(columns)

    async def _with_attempt(self, rollout_ids: list[str], attempt_id: str | None) -> list[str]:
        """The rollouts that have the attempt."""
        asked = [self._ask(self._shard(each), "query_attempts", each, Page()) for each in dict.fromkeys(rollout_ids)]
        answers = await asyncio.gather(*asked)
        found = {attempt.rollout_id for answer in answers for attempt in answer if attempt.attempt_id == attempt_id}
        return [rollout_id for rollout_id in rollout_ids if rollout_id in found]

    def _split_spans(self, encoded: pa.Buffer | None) -> dict[int, tuple[pa.Buffer, Sequence[int]]]:
        """The encoded spans of each shard, and which rows of the whole they are."""
        if encoded is None:
            return {}
        batch = decode_batch(encoded)
        rows = rows_by_shard(batch, len(self.shards))
        if len(rows) == 1:
            return {shard: (encoded, range(batch.num_rows)) for shard in rows}
        return {shard: (encode_batch(batch.take(mine)), mine.to_pylist()) for shard, mine in rows.items()}

    # --- resources ------------------------------------------------------------------------------------------

    async def _update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        update = await self._ask(HOME, "update_resources", resources_id, resources)
        others = (shard for shard in range(len(self.shards)) if shard != HOME)
        await self._ask_some("update_resources", dict.fromkeys(others, (resources_id, resources)))
        return update

    async def _with_resources(self, requests: list[EnqueueRolloutRequest]) -> list[EnqueueRolloutRequest]:
        """The home's latest resources for those that name none: shards may have seen another order."""
        if all(request.resources_id is not None for request in requests):
            return requests
        latest = await self._ask(HOME, "get_latest_resources")
        if latest is None:
            return requests
        update = {"resources_id": latest.resources_id}
        return [r if r.resources_id is not None else r.model_copy(update=update) for r in requests]

    async def _ask_with_copies(self, shard: int, resources_ids: Iterable[str | None], name: str, *args: Any) -> Any:
        """Ask a shard for what names resources; copies of those it misses are made, if the home has them."""
        try:
            return await self._ask(shard, name, *args)
        except StoreError:
            if not [await self._copy(shard, each) for each in {*resources_ids} if each is not None].count(True):
                raise
        return await self._ask(shard, name, *args)

    async def _copy(self, shard: int, resources_id: str) -> bool:
        if shard == HOME or await self._ask(shard, "get_resources_by_id", resources_id) is not None:
            return False
        update = await self._ask(HOME, "get_resources_by_id", resources_id)
        if update is not None:
            await self._ask(shard, "update_resources", resources_id, update.resources)
        return update is not None

    # --- all of it ------------------------------------------------------------------------------------------

    async def _sql(self, query: str) -> pa.Table:
        tables = await self._ask_all("tables", columns_needed(query))
        return await asyncio.to_thread(sql_over_tables, query, tables)

    async def _tables(self, columns: list[str] | None) -> dict[str, pa.Table]:
        return merge_tables(await self._ask_all("tables", columns))

    async def _statistics(self) -> dict[str, Any]:
        return merge_statistics(await self._ask_all("statistics"), await self._workers())

    async def _compact(self) -> None:
        await self._ask_all("compact")


_OF_THE_ROLLOUT = frozenset(
    {"start_attempt", "update_attempt", "get_rollout_by_id", "get_latest_attempt", "query_attempts"}
)
"""Done by the shard of the rollout whose id is the first argument."""

_OF_THE_HOME = frozenset({"get_resources_by_id", "get_latest_resources", "query_resources"})

_WAITING = frozenset({"dequeue_many_rollouts", "wait_for_queue", "wait_for_rollouts"})

_MERGED = frozenset(
    {
        "enqueue_many_rollouts",
        "start_rollout",
        "update_rollout",
        "finish_many_attempts",
        "delete_rollouts",
        "query_rollouts",
        "heartbeat",
        "update_worker",
        "release_worker",
        "get_worker_by_id",
        "query_workers",
        "append_spans",
        "get_many_span_sequence_ids",
        "scan_spans",
        "update_resources",
        "sql",
        "tables",
        "statistics",
        "compact",
    }
)
"""Done by the method of that name, with the help of several shards; so are those that wait."""


def _placed(answers: Iterable[Sequence[Any]]) -> list[Any]:
    """The items of several answers, each at its place in the whole."""
    whole = {place: item for places, items in answers for place, item in zip(places, items, strict=True)}
    return [whole[place] for place in sorted(whole)]


def _answers(shards: Iterable[int], outcomes: Sequence[Any]) -> dict[int, Any]:
    """The outcomes by shard. Raises what went wrong: a defect first, then a shard out of reach (all can be sent
    again), then what all the refusals say.
    """
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for error in errors:
        if not isinstance(error, (InfrastructureError, StoreError)):
            raise error
    for kind in (InfrastructureError, StoreError):
        same = [error for error in errors if isinstance(error, kind)]
        if len(same) == 1:
            raise same[0]
        if same:
            raise kind("; ".join(dict.fromkeys(map(str, same)))) from same[0]
    return dict(zip(shards, outcomes, strict=True))
