"""The runner as a Ray actor: a process, a lifetime and restarts around ``lightning_ray.runner``.

Each life of the process is a worker of its own to the store; what the last one was playing comes back when its lease
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any

import ray

from lightning_ray.agent import LitAgent
from lightning_ray.runner import Runner
from lightning_ray.store.base import Store


@ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=-1)
class RunnerActor:
    """Plays an agent for as long as the actor lives."""

    def __init__(self, name: str):
        self._worker_id = f"{name}-{uuid.uuid4().hex[:6]}"
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    async def run(self, agent: LitAgent[Any], store: Store, secret: bytes, concurrency: int) -> None:
        """Lease and play; returns after ``stop``. Ray calls it again in a new life of the process."""
        if self._stopped:
            return
        self._task = asyncio.create_task(Runner(agent, store, self._worker_id, secret, concurrency).run())
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def stop(self) -> None:
        """Cancel what is being played and return from ``run``."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
