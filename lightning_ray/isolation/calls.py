"""Calls of an agent in warm processes of their own: the runner's seam (``running.calls.AgentCalls``)."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from lightning_ray.agent import LitAgent
from lightning_ray.isolation.interpreter import check
from lightning_ray.isolation.process import ChildProcess
from lightning_ray.running.failures import AgentFailed
from lightning_ray.running.travel import pickled
from lightning_ray.tracing.attempt import AttemptTrace
from lightning_ray.types import AttemptedRollout, NamedResources


class CallsInProcesses:
    """Starts a process when none is idle, and keeps it: there are as many as there were calls at once."""

    def __init__(self, agent: LitAgent[Any], python: str | None = None):
        """``python`` is the interpreter of another environment, by default this one."""
        self._agent = pickled(agent)
        self._python = python
        self._checking = asyncio.Lock()
        self._is_checked = python is None
        self._idle: list[ChildProcess] = []
        self._all: set[ChildProcess] = set()

    async def open(self, concurrency: int) -> None:
        """Start the first processes, one for each core, ahead of the calls; what fails is told by these."""
        count = min(concurrency, os.cpu_count() or 1)
        started = await asyncio.gather(*(self._start() for _ in range(count)), return_exceptions=True)
        self._idle += [child for child in started if isinstance(child, ChildProcess)]

    async def call(self, rollout: AttemptedRollout, resources: NamedResources, trace: AttemptTrace) -> None:
        """Play the attempt in a process, which is killed when this is cancelled, and does not survive a crash.

        What the agent returned is among the spans. Raises AgentFailed or ChildDiedError.
        """
        child = self._warm() or await self._start()
        try:
            await child.play(rollout, resources, trace)
        except AgentFailed:
            self._idle.append(child)
            raise
        except BaseException:
            self._all.discard(child)
            await child.kill()
            raise
        self._idle.append(child)

    def stuck(self) -> int:
        """None: a process can be killed."""
        return 0

    async def close(self) -> None:
        """End all processes."""
        children, self._idle = list(self._all), []
        self._all.clear()
        await asyncio.gather(*(child.kill() for child in children), return_exceptions=True)

    def _warm(self) -> ChildProcess | None:
        while self._idle:
            child = self._idle.pop()
            if child.alive:
                return child
            self._all.discard(child)
        return None

    async def _start(self) -> ChildProcess:
        await self._check()
        child = await ChildProcess.start(self._agent, self._python)
        self._all.add(child)
        return child

    async def _check(self) -> None:
        """Raises AgentError if the other interpreter cannot play the agent."""
        async with self._checking:
            if self._python is not None and not self._is_checked:
                await check(self._python, self._agent)
                self._is_checked = True
