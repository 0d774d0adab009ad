"""The runner as a Ray actor: a process around ``lightning_ray.runner``, and what the pool asks of it.

The actor is not restarted: each life is a worker of its own to the store, made by the pool. The pool's questions are
answered in a thread of their own, whatever the agent does to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import sys
from typing import Any

import ray

from actors.names import shown_name
from lightning_ray.agent import LitAgent
from lightning_ray.config import RunnerSettings
from lightning_ray.deaths.process import Whereabouts, here
from lightning_ray.hooks import Hook
from lightning_ray.loading import uncollected
from lightning_ray.runner import Runner
from lightning_ray.running.calls import AgentCalls
from lightning_ray.running.travel import unpickled
from lightning_ray.store.base import Store

STOPPED = "stopped"


@ray.remote(num_cpus=0.5, max_restarts=0, max_task_retries=0, concurrency_groups={"control": 8})
class RunnerActor:
    """Plays an agent for as long as the actor lives."""

    def __init__(self, worker_id: str):
        faulthandler.enable(file=sys.stderr, all_threads=False)
        self._worker_id = worker_id
        self._runner: Runner | None = None
        self._task: asyncio.Task[str] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drained: str | None = None

    def __repr__(self) -> str:
        return shown_name(self)

    @ray.method(concurrency_group="control")
    async def info(self) -> Whereabouts:
        """Where it is."""
        return here()

    async def run(
        self, pickled_agent: bytes, store: Store, secret: bytes, settings: RunnerSettings, hooks: list[Hook]
    ) -> str:
        """Lease and play until drained or stopped; returns why. Raises AgentError if the agent cannot be loaded."""
        if self._drained is not None:
            return self._drained
        with uncollected():
            agent = unpickled(pickled_agent)
        self._loop = asyncio.get_running_loop()
        self._runner = Runner(
            agent,
            store,
            self._worker_id,
            secret,
            settings.concurrency,
            hooks=hooks,
            calls=await _calls(agent, settings),
            is_process=True,
        )
        if self._drained is not None:
            self._runner.drain(self._drained)
        self._task = asyncio.create_task(self._runner.run())
        with contextlib.suppress(asyncio.CancelledError):
            return await self._task
        return STOPPED

    @ray.method(concurrency_group="control")
    async def playing(self) -> int:
        """How many attempts are being played."""
        return 0 if self._runner is None else self._runner.playing

    @ray.method(concurrency_group="control")
    async def drain(self, reason: str) -> None:
        """Lease nothing more, and return from ``run`` when what is being played has ended."""
        self._drained = reason
        if self._runner is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._runner.drain, reason)

    @ray.method(concurrency_group="control")
    async def stop(self) -> None:
        """Cancel what is being played and return from ``run``."""
        self._drained = STOPPED
        if self._task is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)


async def _calls(agent: LitAgent[Any], settings: RunnerSettings) -> AgentCalls | None:
    if settings.isolation is None:
        return None
    from lightning_ray.isolation.calls import CallsInProcesses

    calls = CallsInProcesses(agent, settings.python)
    await calls.open(settings.concurrency)
    return calls
