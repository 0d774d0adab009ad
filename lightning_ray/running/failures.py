"""Whose fault an attempt's bad end is, and its words."""

from __future__ import annotations

import sys
from typing import Any

from lightning_ray.errors import InfrastructureError

CLIENTS = ("openai", "anthropic")
"""Packages whose ``APIConnectionError`` and ``APIStatusError`` tell of a model's endpoint."""
BROKEN = 500
"""HTTP statuses from here on are the endpoint's fault."""
SPENT = 402
"""What the relay answers when all that may be spent is spent."""


class AgentFailed(Exception):
    """An agent's failure that another process has recorded already; ``metadata`` is its attempt's."""

    def __init__(self, metadata: dict[str, Any]):
        super().__init__(metadata["reason"])
        self.metadata = metadata


def metadata_of(error: BaseException) -> dict[str, Any]:
    """An attempt's metadata when ``error`` came out of its agent."""
    return {"reason": f"{type(error).__name__}: {error}", **infrastructure(error)}


def infrastructure(error: BaseException) -> dict[str, bool]:
    """``infrastructure: True`` if it is the system's failure, not the agent's own: its endpoint, or another part, was
    gone or broken.

    What an exception was raised from counts too: frameworks wrap what their clients raise.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, InfrastructureError) or _endpoint_failed(cause):
            return {"infrastructure": True}
        cause = cause.__cause__
    return {}


def _endpoint_failed(error: BaseException) -> bool:
    for name in CLIENTS:
        client = sys.modules.get(name)
        if client is None or not hasattr(client, "APIStatusError"):
            continue
        if isinstance(error, client.APIConnectionError):
            return True
        if isinstance(error, client.APIStatusError) and (error.status_code >= BROKEN or error.status_code == SPENT):
            return True
    return False
