"""The runner as a Ray actor: a process, a lifetime and restarts around ``lightning_ray.runner``.

Each life of the process is a worker of its own to the store; a new life first gives back what the last one was playing.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import ray

from lightning_ray.agent import LitAgent
from lightning_ray.runner import Runner
from lightning_ray.store.client import Store


@ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=-1)
class RunnerActor:
    """Plays an agent for as long as the actor lives."""

    def __init__(self, name: str, agent: LitAgent[Any], store: Store, secret: bytes, concurrency: int):
        self._name = name
        self._arguments = (agent, store, f"{name}-{uuid.uuid4().hex[:6]}", secret, concurrency)

    async def run(self) -> None:
        """Lease and play; ends only by ``stop`` (cancellation) or with the process."""
        agent, store, worker_id, secret, concurrency = self._arguments
        self._task = asyncio.create_task(Runner(agent, store, worker_id, secret, concurrency).run())
        try:
            await self._task
        except asyncio.CancelledError:
            return

    async def stop(self) -> None:
        """Cancel what is being played and return from ``run``."""
        self._task.cancel()
