"""What Ray shows of an actor: in its dashboard beside the class, in front of each line that it logs, before the names
of its tasks. Ray asks once, when the actor has been made, and keeps the answer.
"""

from __future__ import annotations

import ray


def shown_name(actor: object) -> str:
    """The name that the actor has in Ray, for its ``__repr__``; that of its class if it has none."""
    name: str | None = ray.get_runtime_context().get_actor_name() if ray.is_initialized() else None
    return name or type(actor).__name__
