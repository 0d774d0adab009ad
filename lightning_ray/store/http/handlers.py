"""What each REST path of the store's HTTP API does with its Store: the table of paths, and their handlers.

A handler takes a Call and gives what is answered; it raises for the rest, see ``app``. Paths with ids in them come
after those with fixed words in the same place.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import BaseModel

from lightning_ray.store.base import Finish
from lightning_ray.store.http import requests as r
from lightning_ray.store.http.bodies import Refusal, decode_arrow
from lightning_ray.store.http.call import Call, spans_of_list
from lightning_ray.store.lifecycle import new_id
from lightning_ray.types import UNSET, Attempt, EnqueueRolloutRequest, ResourcesUpdate, Rollout, Span, Worker

MAX_WAIT_SECONDS = 60.0
"""How long one request may wait inside the store; callers that want to wait longer ask again."""


class Path(NamedTuple):
    """One path: what it does, and the codes of success and of a refusal for no unknown id."""

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Any]]
    status: int = 200
    refused: int = 422


def _page(request: r.PageRequest, model: type[BaseModel]) -> dict[str, Any]:
    """The arguments of a query. Raises Refusal 400 for a page that cannot be."""
    if request.sort_by is not None and request.sort_by not in model.model_fields:
        raise Refusal(400, f"sort_by: {request.sort_by!r} is no field; use one of {', '.join(model.model_fields)}")
    if request.limit == 0 or request.limit < -1:
        raise Refusal(400, f"limit: {request.limit} must be above 0, or -1 for all")
    if request.offset < 0:
        raise Refusal(400, f"offset: {request.offset} must be 0 or above")
    return request.model_dump()


def _patience(timeout: float | None) -> float:
    return MAX_WAIT_SECONDS if timeout is None else min(timeout, MAX_WAIT_SECONDS)


def _not_null(changes: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        if name in changes and changes[name] is None:
            raise Refusal(400, f"{name}: it cannot be null; leave it out to keep it as it is")
    return changes


# --- the store itself ---------------------------------------------------------------------------------------


async def _health(call: Call) -> dict[str, str]:
    return {"status": "ok"}


async def _compact(call: Call) -> dict[str, str]:
    await call.store.compact()
    return {"status": "ok"}


async def _sql(call: Call) -> pa.Table:
    return await call.store.sql((await call.body(r.Sql)).query)


# --- rollouts -----------------------------------------------------------------------------------------------


async def _enqueue(call: Call) -> list[Rollout]:
    rollouts = (await call.body(r.Enqueue)).rollouts
    call.resources += {one.resources_id for one in rollouts if one.resources_id is not None}
    return await call.store.enqueue_many_rollouts(rollouts) if rollouts else []


async def _dequeue(call: Call) -> list[Any]:
    wanted = await call.body(r.Dequeue)
    return await call.waiting(
        call.store.dequeue_many_rollouts(
            limit=wanted.limit,
            worker_id=wanted.worker_id,
            timeout=_patience(wanted.timeout),
            request_id=wanted.request_id,
        )
    )


async def _wait_for_rollouts(call: Call) -> list[Rollout]:
    wanted = await call.body(r.WaitForRollouts)
    call.rollouts += wanted.rollout_ids
    timeout = _patience(wanted.timeout)
    return await call.waiting(call.store.wait_for_rollouts(rollout_ids=wanted.rollout_ids, timeout=timeout))


async def _start_rollout(call: Call) -> Any:
    wanted = await call.body(r.StartRollout)
    if wanted.resources_id is not None:
        call.resources.append(wanted.resources_id)
    request = EnqueueRolloutRequest(
        input=wanted.input,
        mode=wanted.mode,
        resources_id=wanted.resources_id,
        config=wanted.config,
        metadata=wanted.metadata,
        rollout_id=wanted.rollout_id or new_id("ro"),
    )
    # Not ``start_rollout``: a caller that resends has named the attempt as well.
    return await call.store._call("start_rollout", request, wanted.attempt_id or new_id("at"), wanted.worker_id)


async def _search_rollouts(call: Call) -> Any:
    return await _query_rollouts(call, await call.body(r.QueryRollouts))


async def _query_rollouts(call: Call, query: r.QueryRollouts) -> Any:
    return await call.store.query_rollouts(**_page(query, Rollout))


async def _update_rollout(call: Call) -> Rollout:
    changes = _not_null((await call.body(r.UpdateRollout)).given(), "status", "config")
    if (resources_id := changes.get("resources_id")) is not None:
        call.resources.append(resources_id)
    return await call.store.update_rollout(call.path("rollout_id"), **changes)


async def _delete_rollouts(call: Call) -> dict[str, list[str]]:
    return {"rollout_ids": await call.store.delete_rollouts((await call.body(r.RolloutIds)).rollout_ids)}


async def _delete_rollout(call: Call) -> dict[str, list[str]]:
    return {"rollout_ids": await call.store.delete_rollouts([call.path("rollout_id")])}


# --- attempts -----------------------------------------------------------------------------------------------


async def _start_attempt(call: Call) -> Any:
    wanted = await call.body(r.StartAttempt)
    return await call.store.start_attempt(call.path("rollout_id"), wanted.worker_id, attempt_id=wanted.attempt_id)


async def _search_attempts(call: Call) -> Any:
    return await _query_attempts(call, await call.body(r.QueryAttempts))


async def _query_attempts(call: Call, query: r.QueryAttempts) -> Any:
    return await call.store.query_attempts(call.path("rollout_id"), **_page(query, Attempt))


async def _update_attempt(call: Call) -> Attempt:
    changes = _not_null((await call.body(r.UpdateAttempt)).given(), "status", "worker_id", "last_heartbeat_time")
    return await call.store.update_attempt(call.path("rollout_id"), call.path("attempt_id"), **changes)


async def _finish(call: Call) -> list[Rollout]:
    wanted = await call.body(r.FinishMany)
    if isinstance(wanted.spans, bytes):
        spans = decode_arrow(wanted.spans)
    else:
        spans = spans_of_list(wanted.spans or [])
    call.name_attempts([one.pair for one in wanted.finishes])
    call.name_spans(spans)
    finishes = [Finish(*one.pair, one.status, one.metadata) for one in wanted.finishes]
    return await call.store.finish_many_attempts(finishes, spans)


# --- workers ------------------------------------------------------------------------------------------------


async def _search_workers(call: Call) -> Any:
    return await _query_workers(call, await call.body(r.QueryWorkers))


async def _query_workers(call: Call, query: r.QueryWorkers) -> Any:
    return await call.store.query_workers(**_page(query, Worker))


async def _update_worker(call: Call) -> Worker:
    changes = _not_null((await call.body(r.UpdateWorker)).given(), "heartbeat_stats")
    return await call.store.update_worker(call.path("worker_id"), changes.get("heartbeat_stats", UNSET))


async def _heartbeat(call: Call) -> dict[str, list[dict[str, str]]]:
    attempts = [one.pair for one in (await call.body(r.Heartbeat)).attempts]
    stop = await call.store.heartbeat(call.path("worker_id"), attempts)
    return {"stop": [{"rollout_id": rollout_id, "attempt_id": attempt_id} for rollout_id, attempt_id in stop]}


async def _release(call: Call) -> dict[str, list[str]]:
    reason = (await call.body(r.Release)).reason
    return {"rollout_ids": await call.store.release_worker(call.path("worker_id"), reason)}


# --- resources ----------------------------------------------------------------------------------------------


async def _query_resources(call: Call) -> Any:
    return await call.store.query_resources(**_page(call.query(r.QueryResources), ResourcesUpdate))


async def _add_resources(call: Call) -> ResourcesUpdate:
    return await call.store.add_resources(await call.resources_body())


async def _get_resources(call: Call) -> ResourcesUpdate | None:
    return await call.store.get_resources_by_id(call.path("resources_id"))


async def _update_resources(call: Call) -> ResourcesUpdate:
    return await call.store.update_resources(call.path("resources_id"), await call.resources_body())


# --- spans --------------------------------------------------------------------------------------------------


async def _add_spans(call: Call) -> Span | dict[str, Any] | None:
    """One span is answered by itself, or null if it was there; many by how many were stored, and the rows that
    were there.
    """
    spans = await call.spans_body()
    if isinstance(spans, Span):
        return await call.store.add_span(spans)
    left_out = await call.store.append_spans(spans)
    return {"stored": spans.num_rows - len(left_out), "left_out": left_out}


async def _search_spans(call: Call) -> Any:
    return await _query_spans(call, await call.body(r.QuerySpans))


async def _query_spans(call: Call, query: r.QuerySpans) -> Any:
    call.rollouts.append(query.rollout_id)
    if query.attempt_id not in (None, "latest"):
        call.attempts.append((query.rollout_id, str(query.attempt_id)))
    return await call.store.query_spans(**_page(query, Span))


async def _scan_spans(call: Call) -> pa.Table:
    wanted = await call.body(r.ScanSpans)
    call.rollouts += wanted.rollout_ids
    return await call.store.scan_spans(wanted.rollout_ids, wanted.attempt_id, wanted.columns)


async def _next_sequence_id(call: Call) -> dict[str, int]:
    wanted = await call.body(r.AttemptName)
    call.name_attempts([wanted.pair])
    return {"sequence_id": await call.store.get_next_span_sequence_id(*wanted.pair)}


async def _next_sequence_ids(call: Call) -> dict[str, list[int]]:
    pairs = [one.pair for one in (await call.body(r.NextSequenceIds)).attempts]
    call.name_attempts(pairs)
    return {"sequence_ids": list(await call.store.get_many_span_sequence_ids(pairs))}


_ROLLOUT, _ATTEMPT, _WORKER = (
    "rollouts/{rollout_id}",
    "rollouts/{rollout_id}/attempts/{attempt_id}",
    "workers/{worker_id}",
)
PATHS = [
    Path("GET", "health", _health),
    Path("GET", "statistics", lambda call: call.store.statistics()),
    Path("POST", "compact", _compact),
    Path("POST", "sql", _sql),
    Path("POST", "queues/rollouts/enqueue", _enqueue, 201, 409),
    Path("POST", "queues/rollouts/dequeue", _dequeue),
    Path("POST", "waits/rollouts", _wait_for_rollouts),
    Path("POST", "rollouts", _start_rollout, 201, 409),
    Path("GET", "rollouts", lambda call: _query_rollouts(call, call.query(r.QueryRollouts))),
    Path("POST", "rollouts/search", _search_rollouts),
    Path("POST", "rollouts/delete", _delete_rollouts),
    Path("GET", _ROLLOUT, lambda call: call.store.get_rollout_by_id(call.path("rollout_id"))),
    Path("POST", _ROLLOUT, _update_rollout, refused=409),
    Path("DELETE", _ROLLOUT, _delete_rollout),
    Path("POST", f"{_ROLLOUT}/attempts", _start_attempt, 201, 409),
    Path("GET", f"{_ROLLOUT}/attempts", lambda call: _query_attempts(call, call.query(r.QueryAttempts))),
    Path("POST", f"{_ROLLOUT}/attempts/search", _search_attempts),
    Path("GET", f"{_ROLLOUT}/attempts/latest", lambda call: call.store.get_latest_attempt(call.path("rollout_id"))),
    Path("POST", _ATTEMPT, _update_attempt, refused=409),
    Path("POST", "attempts/finish", _finish, refused=409),
    Path("GET", "workers", lambda call: _query_workers(call, call.query(r.QueryWorkers))),
    Path("POST", "workers/search", _search_workers),
    Path("GET", _WORKER, lambda call: call.store.get_worker_by_id(call.path("worker_id"))),
    Path("POST", _WORKER, _update_worker),
    Path("POST", f"{_WORKER}/heartbeat", _heartbeat),
    Path("POST", f"{_WORKER}/release", _release),
    Path("GET", "resources", _query_resources),
    Path("POST", "resources", _add_resources, 201),
    Path("GET", "resources/latest", lambda call: call.store.get_latest_resources()),
    Path("GET", "resources/{resources_id}", _get_resources),
    Path("POST", "resources/{resources_id}", _update_resources),
    Path("POST", "spans", _add_spans, 201),
    Path("GET", "spans", lambda call: _query_spans(call, call.query(r.QuerySpans))),
    Path("POST", "spans/search", _search_spans),
    Path("POST", "spans/scan", _scan_spans),
    Path("POST", "spans/next", _next_sequence_id),
    Path("POST", "spans/next/many", _next_sequence_ids),
]
