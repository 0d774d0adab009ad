"""Clients of the span store, with the same async calls: on a Ray actor, and in-process.

Every call may be resent: clients choose the ids, so that a call whose answer was lost is answered alike. A
StoreClient does so by itself while the actor restarts, until its deadline; then it raises
InfrastructureError. Clients build the Arrow batches; spans travel as the bytes that the log will hold.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from lightning_ray.errors import InfrastructureError, LightningRayError
from lightning_ray.store.core import SpanStore
from lightning_ray.store.lifecycle import new_id
from lightning_ray.store.schema import decode_table, encode_batch
from lightning_ray.store.service import StoreService
from lightning_ray.types import (
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    NamedResources,
    ResourcesUpdate,
    Rollout,
)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class Store(ABC):
    """The store's calls: all answers are durable, all calls may be resent.

    StoreError means refused (do not resend), InfrastructureError that the store is out of reach or its disk
    failed.
    """

    async def enqueue_many_rollouts(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        """Queue rollouts, with the latest resources unless they name others.

        One whose ``rollout_id`` is known is answered as it stands. Raises StoreError for unknown resources.
        """
        named = [
            request if request.rollout_id else request.model_copy(update={"rollout_id": new_id("ro")})
            for request in requests
        ]
        return await self._call("enqueue_many_rollouts", named)

    async def dequeue_many_rollouts(
        self, limit: int, worker_id: str, timeout: float = 0.0, request_id: str | None = None
    ) -> list[AttemptedRollout]:
        """Lease up to ``limit`` rollouts, oldest first; with an empty queue wait up to ``timeout`` seconds
        for one.

        The worker renews its leases by ``heartbeat``. Resending with the same ``request_id`` gives the same
        claims.
        """
        request_id = request_id or new_id("rq")
        return await self._call("dequeue_many_rollouts", limit, worker_id, request_id, timeout=timeout)

    async def add_many_spans(self, batch: pa.RecordBatch) -> None:
        """Store spans (SPAN_SCHEMA), each once by (rollout, attempt, span id).

        Raises StoreError naming attempts the store does not know, after the other rows were stored.
        """
        await self._call("add_many_spans", encode_batch(batch))

    async def finish_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: str,
        spans: pa.RecordBatch | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        """End an attempt and store its last spans, both or neither; returns the rollout as it then stands.

        An attempt that has ended stays as it is. ``metadata`` with ``infrastructure: True`` (and a
        ``reason``) marks a failure that is not the agent's and does not count against ``max_attempts``.
        """
        encoded = None if spans is None or not spans.num_rows else encode_batch(spans)
        return await self._call("finish_attempt", rollout_id, attempt_id, status, encoded, metadata)

    async def update_rollout(self, rollout_id: str, status: str) -> Rollout:
        """Cancel a rollout (``"cancelled"``); one that has ended stays as it is."""
        return await self._call("update_rollout", rollout_id, status)

    async def heartbeat(self, worker_id: str, attempts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Renew the leases of the (rollout, attempt) ids a worker is at; returns those it is to stop."""
        return await self._call("heartbeat", worker_id, list(attempts))

    async def release_worker(self, worker_id: str, reason: str) -> list[str]:
        """Queue again what a dead worker was at; returns the rollouts' ids.

        A worker that is started again takes a new id.
        """
        return await self._call("release_worker", worker_id, reason)

    async def query_rollouts(
        self, status_in: Sequence[str] | None = None, rollout_id_in: Sequence[str] | None = None
    ) -> list[Rollout]:
        """The rollouts that pass both filters; in order of enqueueing, or of the ids if there are any."""
        return await self._call("query_rollouts", status_in, rollout_id_in)

    async def query_attempts(self, rollout_id: str) -> list[Attempt]:
        """The rollout's attempts, in order. Raises StoreError if it is unknown."""
        return await self._call("query_attempts", rollout_id)

    async def query_spans(self, rollout_id_in: Sequence[str]) -> pa.Table:
        """The spans of the rollouts, one rollout after the other, each in order of arrival; all attempts."""
        return await self._call("query_spans", list(rollout_id_in))

    async def wait_for_rollouts(self, rollout_ids: Sequence[str], timeout: float) -> list[Rollout]:
        """Wait until all have ended, at most ``timeout`` seconds; returns those that have.

        Raises StoreError if one is unknown.
        """
        return await self._call("wait_for_rollouts", list(rollout_ids), timeout=timeout)

    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under a new id."""
        return await self.update_resources(new_id("rs"), resources)

    async def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        """Publish resources under an id, as the latest; the same content again is no new version."""
        return await self._call("update_resources", resources_id, resources)

    async def get_resources_by_id(self, resources_id: str) -> ResourcesUpdate | None:
        """The resources published last under that id."""
        return await self._call("get_resources_by_id", resources_id)

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        """The resources published last."""
        return await self._call("get_latest_resources")

    async def statistics(self) -> dict[str, Any]:
        """Counts of rollouts, attempts and spans."""
        return await self._call("statistics")

    @abstractmethod
    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """Have the service do one call; ``timeout`` is how long it may wait inside the store, in seconds."""


class LocalStoreClient(Store):
    """A store in this process and event loop: for tests and for runs without Ray."""

    def __init__(self, store: SpanStore) -> None:
        self._service = StoreService(store)

    async def close(self) -> None:
        """Make all durable and let go of the folder."""
        await self._service.close()

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        return await self._service.call(name, *args, timeout=timeout)


class StoreClient(Store):
    """A store behind a Ray actor (``actors.span_store``). Works wherever Ray does, and can be pickled.

    ``deadline`` is how many seconds a call may go without an answer, beyond the time it asked to wait.
    """

    def __init__(self, handle: Any, deadline: float = 120.0) -> None:
        self._handle = handle
        self._deadline = deadline

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        end = time.monotonic() + self._deadline + (timeout or 0.0)
        wait_end = None if timeout is None else time.monotonic() + timeout
        pause, cause = _FIRST_PAUSE, "no answer"
        while (left := end - time.monotonic()) > 0:
            timeout = None if wait_end is None else max(0.0, wait_end - time.monotonic())
            try:
                answer = await asyncio.wait_for(self._handle.call.remote(name, *args, timeout=timeout), left)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, LightningRayError) else error) from None
            except RayActorError as error:
                cause = str(error).strip() or type(error).__name__
                if error.actor_init_failed:
                    break
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.0), max(0.0, end - time.monotonic())))
                pause = min(2 * pause, _LONGEST_PAUSE)
            except TimeoutError:
                break
            else:
                return decode_table(answer) if name == "query_spans" else answer
        raise InfrastructureError(
            f"the span store cannot answer {name} (deadline {self._deadline} s): {cause}; see its actor's log"
        )
