"""Who a process of the run is: what must be known of it while it lives, to tell why it died."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from lightning_ray.deaths.evidence import exits, is_here, memory_kills


class Whereabouts(TypedDict):
    """What a process tells of itself; travels as it is."""

    pid: int
    node_id: str
    node: str
    """Address of its node."""
    log: str | None
    """The file with what it writes on standard error, on its node."""
    memory_kills: int | None
    """Processes that the node's kernel had killed for want of memory, when this was asked."""


@dataclass(frozen=True)
class Process:
    """One process. What is not known is None."""

    role: str
    """``runner``, ``trainer rank``, ``policy replica``, ``span store``, ...: a key of ``death.AFTERMATH``."""
    name: str = ""
    pid: int | None = None
    node_id: str | None = None
    node: str | None = None
    log: str | None = None
    memory_kills: int | None = None

    @classmethod
    def at(cls, role: str, name: str, where: Mapping[str, Any] | None) -> Process:
        """A process by what it told of itself (see ``here``), if it did. On this node its end will be known."""
        if where is None:
            return cls(role, name)
        if is_here(where["node_id"]):
            exits.hold(where["pid"])
        known = ("pid", "node_id", "node", "log", "memory_kills")
        return cls(role, name, **{key: where[key] for key in known if key in where})

    def __str__(self) -> str:
        return self.name if self.name.startswith(self.role) else f"{self.role} {self.name}".strip()

    @property
    def place(self) -> str:
        """``process 7, node 10.0.0.1``, as far as it is known."""
        node = self.node if self.role != "node" else None
        return ", ".join([f"process {self.pid}"] * bool(self.pid) + [f"node {node}"] * bool(node))


def here() -> Whereabouts:
    """Of the present process, a worker of Ray."""
    import ray

    return {
        "pid": os.getpid(),
        "node_id": ray.get_runtime_context().get_node_id(),
        "node": ray.util.get_node_ip_address(),
        "log": ray._private.worker.global_worker.get_err_file_path() or None,
        "memory_kills": memory_kills(),
    }
