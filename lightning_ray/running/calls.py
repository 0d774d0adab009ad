"""How an agent is called: the seam between a runner and the place where the agent's code runs.

Here in this process; ``lightning_ray.isolation`` has the other place.
"""

from __future__ import annotations

import contextvars
from typing import Any, Protocol

from lightning_ray.agent import LitAgent, contained
from lightning_ray.running.threads import AgentThreads
from lightning_ray.tracing.attempt import AttemptTrace
from lightning_ray.types import AttemptedRollout, NamedResources


class AgentCalls(Protocol):
    """Calls one agent, many times at once."""

    async def call(self, rollout: AttemptedRollout, resources: NamedResources, trace: AttemptTrace) -> Any:
        """What the agent returns or raises; ends it when cancelled. Its spans are recorded in ``trace``."""

    def stuck(self) -> int:
        """How many calls that were cancelled still go on."""

    async def close(self) -> None:
        """Let go of whatever calls need."""


class CallsHere:
    """Async agents in the event loop, others in threads."""

    def __init__(self, agent: LitAgent[Any]):
        self._agent = agent
        self._threads = AgentThreads()

    async def call(self, rollout: AttemptedRollout, resources: NamedResources, trace: AttemptTrace) -> Any:
        """See ``AgentCalls``; the attempt is the one at work in this task."""
        method = method_of(self._agent, rollout)
        arguments = (rollout.input, resources, rollout)
        if self._agent.is_async():
            return await method(*arguments)
        here = contextvars.copy_context()
        name = rollout.attempt.attempt_id
        return await self._threads.call(here.run, contained, self._agent, method, *arguments, name=name)

    def stuck(self) -> int:
        """Threads that do not end."""
        return self._threads.stuck()

    async def close(self) -> None:
        """Threads end with the process."""


def method_of(agent: LitAgent[Any], rollout: AttemptedRollout) -> Any:
    """The agent's method for the rollout's mode."""
    name = "validation_rollout" if rollout.mode in ("val", "test") else "training_rollout"
    return getattr(agent, f"{name}_async" if agent.is_async() else name)
