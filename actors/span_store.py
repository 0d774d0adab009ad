"""The span store as a Ray actor: one named process that writes a run's folder and is restarted when it dies.

Replaying the folder on each start, it stands where it stood; every call may be resent, so Ray and the clients
resend. The folder must be on the actor's node, or shared. The calls themselves are lightning_ray.store's.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from actors.names import shown_name
from lightning_ray.errors import InfrastructureError, LightningRayError, StoreError
from lightning_ray.mirror import url_of
from lightning_ray.store.core import SpanStore
from lightning_ray.store.line import Answer, Envelope, LineServer
from lightning_ray.store.log import Fsync
from lightning_ray.store.service import StoreService
from lightning_ray.store.shard_folder import ShardLayout, check_layout, shard_folder, write_layout
from lightning_ray.store.wire import decode, encode, outcome_of

MANY_CALLS = 100_000
"""Calls the actor takes at once: waiting dequeues must never keep a write from its turn."""

START_SECONDS = 600.0
"""How long shards may take to start: they replay what they hold."""

_GARBAGE = (50_000, 20, 50)
"""Thresholds of Python's collector: a store makes many objects that live long, and cycles hardly ever."""

logger = logging.getLogger(__name__)


class SpanStoreActor:
    """A process around a StoreService; talked to through ``lightning_ray.store.StoreClient``."""

    def __init__(self, folder: str, settings: dict[str, Any], must_exist: bool = False) -> None:
        if must_exist and not Path(folder).is_dir():
            raise StoreError(
                f"{folder} is not on node {ray.util.get_node_ip_address()}: start the store where it was, or copy it "
                "here"
            )
        self._service = StoreService(SpanStore(folder, **settings))
        self._lines = LineServer(self.calls)
        gc.freeze()
        gc.set_threshold(*_GARBAGE)

    def __repr__(self) -> str:
        return shown_name(self)

    async def calls(self, envelopes: Sequence[Envelope], buffers: list[pa.Buffer]) -> list[Answer]:
        """Calls of the service, done in order, and their answers; all are given once all are durable that must be."""
        answers: list[Answer | Awaitable[Answer]] = []
        first, synced = 0, False
        for message, timeout, count in envelopes:
            name, args = decode(message, buffers[first : first + count])
            first += count
            synced |= self._service.is_synced(name, args)
            immediate = self._service.is_immediate(name, timeout)
            answers.append(self._do(name, args) if immediate else self._call(name, args, timeout))
        try:
            if synced:
                await self._service.durable()
        except Exception as error:
            answers = [_refusal(error) if isinstance(answer, tuple) else answer for answer in answers]
        return [answer if isinstance(answer, tuple) else await answer for answer in answers]

    def _do(self, name: str, args: list[Any]) -> Answer:
        try:
            return encode([None, self._service.do(name, *args)], f"the answer of {name}")
        except Exception as error:
            return _refusal(error, name)

    async def _call(self, name: str, args: list[Any], timeout: float | None) -> Answer:
        try:
            return encode([None, await self._service.call(name, *args, timeout=timeout)], f"the answer of {name}")
        except Exception as error:
            return _refusal(error, name)

    async def line(self) -> str | None:
        """Where ``calls`` can be had without Ray, by processes of this machine."""
        return await self._lines.address()

    async def process_id(self) -> int:
        """The actor's process, for operators and tests."""
        return os.getpid()

    async def close(self) -> None:
        """Make all durable and let go of the folder; the actor is of no more use."""
        self._lines.close()
        await self._service.close()


def _refusal(error: Exception, name: str = "the disk") -> Answer:
    if not isinstance(error, LightningRayError):
        logger.error("%s failed in the span store", name, exc_info=error)
    return encode([outcome_of(error), None], "an error")


def start(
    folder: str | Path,
    name: str,
    *,
    fsync: Fsync = "group",
    lease_seconds: float = 60.0,
    retention_seconds: float | None = None,
    num_cpus: float = 0,
    node_id: str | None = None,
    must_exist: bool = False,
) -> Any:
    """Start the store of a folder as a named actor and return its handle; wrap it in a StoreClient.

    It lives, for ever restarted, on this node, or on that of the (hex) ``node_id``, where the folder is;
    with ``must_exist`` it does not start without the folder.
    Raises ValueError (from Ray) if the name is taken in this namespace.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = NodeAffinitySchedulingStrategy(node_id or ray.get_runtime_context().get_node_id(), soft=False)
    settings = {"fsync": fsync, "lease_seconds": lease_seconds, "retention_seconds": retention_seconds}
    actor = ray.remote(SpanStoreActor)
    return actor.options(
        name=name,
        num_cpus=num_cpus,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=MANY_CALLS,
        scheduling_strategy=node,
    ).remote(str(Path(folder).absolute()), settings, must_exist)


def start_shards(
    folder: str | Path,
    name: str,
    shards: int,
    *,
    node_ids: Sequence[str] | None = None,
    fsync: Fsync = "group",
    lease_seconds: float = 60.0,
    retention_seconds: float | None = None,
    num_cpus: float = 0,
    among: Callable[[Mapping[str, str]], bool] = lambda labels: True,
) -> list[Any]:
    """Start the store of a folder as ``shards`` actors; wrap each handle in a StoreClient, and these in a
    ShardedStore.

    Shard i is actor ``{name}-{i}`` with the folder ``shard-00i``, on the i-th of the (hex) ``node_ids``; without
    them where it was before, and a new one in turn on this node and those whose labels ``among`` approves of. A single
    shard is the store of ``start``.
    Raises StoreError if the folder has another number of shards, InfrastructureError if one does not start.
    """
    path = Path(folder).absolute()
    path.mkdir(parents=True, exist_ok=True)
    layout = check_layout(path, shards)
    if url_of(path) is not None:  # the driver mirrors it
        node_ids = [ray.get_runtime_context().get_node_id()] * shards
    options: dict[str, Any] = {
        "fsync": fsync,
        "lease_seconds": lease_seconds,
        "retention_seconds": retention_seconds,
        "num_cpus": num_cpus,
    }
    if shards == 1 and layout is None:
        return [start(path, name, **options)]
    places = _places(shards, layout.nodes if layout else [], node_ids, among)
    actors = [
        start(shard_folder(path, shard), f"{name}-{shard}", **options, node_id=node_id, must_exist=layout is not None)
        for shard, (node_id, _) in enumerate(places)
    ]
    try:
        _wait_until_up(actors, places)
    except InfrastructureError:
        for actor in actors:
            ray.kill(actor)
        raise
    write_layout(path, ShardLayout(shards, [address for _, address in places]))
    return actors


def _places(
    shards: int, before: Sequence[str], node_ids: Sequence[str] | None, among: Callable[[Mapping[str, str]], bool]
) -> list[tuple[str, str]]:
    """Each shard's node, as id and address."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in alive}
    if node_ids is not None:
        if len(node_ids) != shards or not set(node_ids) <= set(addresses):
            raise StoreError(f"node_ids is {list(node_ids)}; give {shards} of the cluster's nodes {sorted(addresses)}")
        return [(node_id, addresses[node_id]) for node_id in node_ids]
    here = ray.get_runtime_context().get_node_id()
    meant = [node["NodeID"] for node in alive if node["NodeID"] == here or among(node["Labels"])]
    nodes = sorted(meant, key=lambda node_id: (node_id != here, addresses[node_id], node_id))
    chosen = [nodes[shard % len(nodes)] for shard in range(shards)]
    for shard, address in enumerate(before):
        chosen[shard] = next((node_id for node_id in nodes if addresses[node_id] == address), chosen[shard])
    return [(node_id, addresses[node_id]) for node_id in chosen]


def _wait_until_up(actors: Sequence[Any], places: Sequence[tuple[str, str]]) -> None:
    end = time.monotonic() + START_SECONDS
    calls = [actor.process_id.remote() for actor in actors]
    for shard, (call, (_, address)) in enumerate(zip(calls, places, strict=True)):
        try:
            ray.get(call, timeout=max(0.0, end - time.monotonic()))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise InfrastructureError(
                f"shard {shard} of {len(actors)} did not start on node {address}: {reason}"
            ) from error
