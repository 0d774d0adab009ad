"""The span store as a Ray actor: one named process that writes a run's folder and is restarted when it dies.

Replaying the folder on each start, it stands where it stood; every call may be resent, so Ray and the clients
resend. The folder must be on the actor's node, or shared. The calls themselves are lightning_ray.store's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

from lightning_ray.store.core import SpanStore
from lightning_ray.store.log import Fsync
from lightning_ray.store.schema import encode_table
from lightning_ray.store.service import StoreService

MANY_CALLS = 100_000
"""Calls the actor takes at once: waiting dequeues must never keep a write from its turn."""


class SpanStoreActor:
    """A process around a StoreService; talked to through ``lightning_ray.store.StoreClient``."""

    def __init__(self, folder: str, fsync: Fsync, lease_seconds: float) -> None:
        self._service = StoreService(SpanStore(folder, fsync=fsync, lease_seconds=lease_seconds))

    async def call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """One call of the service; a table of spans is answered as an IPC stream."""
        answer = await self._service.call(name, *args, timeout=timeout)
        return encode_table(answer) if name == "query_spans" else answer

    async def process_id(self) -> int:
        """The actor's process, for operators and tests."""
        return os.getpid()

    async def close(self) -> None:
        """Make all durable and let go of the folder; the actor is of no more use."""
        await self._service.close()


def start(
    folder: str | Path, name: str, *, fsync: Fsync = "group", lease_seconds: float = 60.0, num_cpus: float = 0
) -> Any:
    """Start the store of a folder as a named actor and return its handle; wrap it in a StoreClient.

    Ray restarts it for ever. Raises ValueError (from Ray) if the name is taken in this namespace.
    """
    actor = ray.remote(SpanStoreActor)
    return actor.options(
        name=name, num_cpus=num_cpus, max_restarts=-1, max_task_retries=-1, max_concurrency=MANY_CALLS
    ).remote(str(Path(folder).absolute()), fsync, lease_seconds)
