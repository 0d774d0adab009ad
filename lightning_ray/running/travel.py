"""An agent on its way to another process: as bytes, functions of a script by value."""

from __future__ import annotations

import pickle
from typing import Any

from lightning_ray.agent import LitAgent, name_of
from lightning_ray.errors import AgentError


def pickled(agent: LitAgent[Any]) -> bytes:
    """The agent as bytes. Raises AgentError if it holds something that cannot travel."""
    try:
        import cloudpickle
    except ImportError:
        from ray import cloudpickle
    try:
        data: bytes = cloudpickle.dumps(agent)
    except Exception as error:
        raise AgentError(
            f"agent {name_of(agent)!r} cannot be sent to a runner: {type(error).__name__}: {error}; make what it holds "
            "(clients, locks, open files) inside of the rollout"
        ) from error
    return data


def unpickled(data: bytes) -> LitAgent[Any]:
    """The agent. Raises AgentError if it cannot be imported here."""
    try:
        agent: LitAgent[Any] = pickle.loads(data)
    except Exception as error:
        raise AgentError(
            f"the agent cannot be loaded on a runner: {type(error).__name__}: {error}; what it imports must be "
            "installed on every node, or named by its runtime_env"
        ) from error
    return agent
