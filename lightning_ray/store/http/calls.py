"""How each call of the service's protocol is asked for over HTTP: the other side of ``app``'s paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pydantic import TypeAdapter

from lightning_ray.errors import StoreError
from lightning_ray.store.http.media import ARROW, MSGPACK, plain
from lightning_ray.store.packing import pack, unpack
from lightning_ray.store.query import Page
from lightning_ray.store.schema import decode_batch, decode_table, encode_table
from lightning_ray.types import (
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    Worker,
)


@dataclass(frozen=True)
class Ask:
    """One request, and what to make of its answer. ``waits``: the body gets the ``timeout`` that is left."""

    method: str
    path: str
    body: dict[str, Any] | pa.Buffer | None
    read: Callable[[bytes], Any]
    waits: bool = False

    def content(self, name: str, timeout: float | None) -> tuple[bytes | None, str]:
        """The body's bytes and content type."""
        if self.body is None:
            return None, MSGPACK
        if isinstance(self.body, pa.Buffer):
            return self.body.to_pybytes(), ARROW
        body = {**self.body, "timeout": timeout} if self.waits else self.body
        return pack(body, f"an argument of {name}"), MSGPACK


def ask(name: str, *args: Any) -> Ask:
    """The request for a call. Raises StoreError for one that HTTP does not offer."""
    if name not in _ASKS:
        raise StoreError(f"the store's HTTP API has no call {name!r}")
    return _ASKS[name](*args)


def as_stream(encoded: pa.Buffer) -> pa.Buffer:
    """A batch of ``encode_batch`` as a stream with its schema."""
    return encode_table(pa.Table.from_batches([decode_batch(encoded)]))


def _reader(model: Any, key: str | None = None) -> Callable[[bytes], Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(model)

    def read(content: bytes) -> Any:
        value = unpack(content)
        return adapter.validate_python(value if key is None else value[key])

    return read


def _table(content: bytes) -> pa.Table:
    return decode_table(pa.py_buffer(content))


def _nothing(content: bytes) -> None:
    return None


_ANY_ROLLOUT = AttemptedRollout | Rollout
_ROLLOUT, _ROLLOUTS, _CLAIM = _reader(_ANY_ROLLOUT), _reader(list[_ANY_ROLLOUT]), _reader(AttemptedRollout)
_ATTEMPT, _WORKER, _RESOURCES = _reader(Attempt), _reader(Worker), _reader(ResourcesUpdate)
_MAYBE_ROLLOUT, _MAYBE_ATTEMPT = _reader(_ANY_ROLLOUT | None), _reader(Attempt | None)
_MAYBE_WORKER, _MAYBE_RESOURCES = _reader(Worker | None), _reader(ResourcesUpdate | None)


def _get(path: str, read: Callable[[bytes], Any]) -> Ask:
    return Ask("GET", path, None, read)


def _post(path: str, body: dict[str, Any] | pa.Buffer | None, read: Callable[[bytes], Any], waits: bool = False) -> Ask:
    return Ask("POST", path, body, read, waits)


def _search(path: str, where: dict[str, Any], page: Page, model: Any) -> Ask:
    return _post(f"{path}/search", {**where, **page._asdict()}, _reader(PaginatedResult[model]))


def _query_resources(where: dict[str, Any], page: Page) -> Ask:
    given = {key: value for key, value in {**where, **page._asdict()}.items() if value is not None}
    query = "&".join(f"{key}={_part(str(value))}" for key, value in given.items())
    return _get(f"resources?{query}", _reader(PaginatedResult[ResourcesUpdate]))


def _enqueue(requests: list[EnqueueRolloutRequest]) -> Ask:
    return _post("queues/rollouts/enqueue", {"rollouts": [plain(one) for one in requests]}, _ROLLOUTS)


def _dequeue(limit: int, worker_id: str | None, request_id: str) -> Ask:
    body = {"limit": limit, "worker_id": worker_id, "request_id": request_id}
    return _post("queues/rollouts/dequeue", body, _reader(list[AttemptedRollout]), waits=True)


def _start_rollout(request: EnqueueRolloutRequest, attempt_id: str, worker_id: str | None) -> Ask:
    return _post("rollouts", {**request.model_dump(), "attempt_id": attempt_id, "worker_id": worker_id}, _CLAIM)


def _start_attempt(rollout_id: str, attempt_id: str, worker_id: str | None) -> Ask:
    body = {"attempt_id": attempt_id, "worker_id": worker_id}
    return _post(f"rollouts/{_part(rollout_id)}/attempts", body, _CLAIM)


def _finish(finishes: list[tuple[str, str, str, dict[str, Any] | None]], encoded: pa.Buffer | None) -> Ask:
    named = [
        {"rollout_id": rollout_id, "attempt_id": attempt_id, "status": status, "metadata": metadata}
        for rollout_id, attempt_id, status, metadata in finishes
    ]
    for one in named:
        pack(one["metadata"], f"metadata of attempt {one['attempt_id']!r} of rollout {one['rollout_id']!r}")
    spans = None if encoded is None else as_stream(encoded).to_pybytes()
    return _post("attempts/finish", {"finishes": named, "spans": spans}, _ROLLOUTS)


def _update_rollout(rollout_id: str, changes: dict[str, Any]) -> Ask:
    return _post(f"rollouts/{_part(rollout_id)}", {key: plain(value) for key, value in changes.items()}, _ROLLOUT)


def _heartbeat(worker_id: str, attempts: list[tuple[str, str]]) -> Ask:
    def read(content: bytes) -> list[tuple[str, str]]:
        return [(one["rollout_id"], one["attempt_id"]) for one in unpack(content)["stop"]]

    return _post(f"workers/{_part(worker_id)}/heartbeat", {"attempts": _named(attempts)}, read)


def _update_worker(worker_id: str, stats: dict[str, Any] | None) -> Ask:
    return _post(f"workers/{_part(worker_id)}", {} if stats is None else {"heartbeat_stats": stats}, _WORKER)


def _update_resources(resources_id: str, resources: NamedResources) -> Ask:
    body = {key: plain(value) for key, value in resources.items()}
    return _post(f"resources/{_part(resources_id)}", body, _RESOURCES)


def _scan(rollout_ids: list[str], attempt_id: str | None, columns: list[str] | None) -> Ask:
    body = {"rollout_ids": rollout_ids, "attempt_id": attempt_id, "columns": columns}
    return _post("spans/scan", body, _table)


def _named(attempts: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"rollout_id": rollout_id, "attempt_id": attempt_id} for rollout_id, attempt_id in attempts]


def _part(identifier: str) -> str:
    return quote(identifier, safe="")


_ASKS: dict[str, Callable[..., Ask]] = {
    "enqueue_many_rollouts": _enqueue,
    "dequeue_many_rollouts": _dequeue,
    "start_rollout": _start_rollout,
    "start_attempt": _start_attempt,
    "append_spans": lambda encoded, synced=True: _post("spans", as_stream(encoded), _reader(list[int], "left_out")),
    "get_many_span_sequence_ids": lambda attempts: _post(
        "spans/next/many", {"attempts": _named(attempts)}, _reader(list[int], "sequence_ids")
    ),
    "finish_many_attempts": _finish,
    "update_rollout": _update_rollout,
    "update_attempt": lambda rollout_id, attempt_id, changes: _post(
        f"rollouts/{_part(rollout_id)}/attempts/{_part(attempt_id)}", changes, _ATTEMPT
    ),
    "update_worker": _update_worker,
    "heartbeat": _heartbeat,
    "release_worker": lambda worker_id, reason: _post(
        f"workers/{_part(worker_id)}/release", {"reason": reason}, _reader(list[str], "rollout_ids")
    ),
    "get_rollout_by_id": lambda rollout_id: _get(f"rollouts/{_part(rollout_id)}", _MAYBE_ROLLOUT),
    "get_latest_attempt": lambda rollout_id: _get(f"rollouts/{_part(rollout_id)}/attempts/latest", _MAYBE_ATTEMPT),
    "get_worker_by_id": lambda worker_id: _get(f"workers/{_part(worker_id)}", _MAYBE_WORKER),
    "get_resources_by_id": lambda resources_id: _get(f"resources/{_part(resources_id)}", _MAYBE_RESOURCES),
    "get_latest_resources": lambda: _get("resources/latest", _MAYBE_RESOURCES),
    "query_rollouts": lambda where, page: _search("rollouts", where, page, _ANY_ROLLOUT),
    "query_attempts": lambda rollout_id, page: _search(f"rollouts/{_part(rollout_id)}/attempts", {}, page, Attempt),
    "query_workers": lambda where, page: _search("workers", where, page, Worker),
    "query_resources": _query_resources,
    "scan_spans": _scan,
    "update_resources": _update_resources,
    "delete_rollouts": lambda rollout_ids: _post(
        "rollouts/delete", {"rollout_ids": rollout_ids}, _reader(list[str], "rollout_ids")
    ),
    "wait_for_rollouts": lambda rollout_ids: _post(
        "waits/rollouts", {"rollout_ids": rollout_ids}, _ROLLOUTS, waits=True
    ),
    "statistics": lambda: _get("statistics", unpack),
    "sql": lambda query: _post("sql", {"query": query}, _table),
    "compact": lambda: _post("compact", {}, _nothing),
}
