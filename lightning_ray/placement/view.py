"""What a cluster has: its nodes with what is free, and the nodes that its autoscaler could add."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ray.placement.asks import Ask
from lightning_ray.placement.settings import matches

ANSWER_SECONDS = 20.0
"""For the head to tell what could be added: a worker may have to start there."""
HEAD = "node:__internal_head__"
COUNTED = ("CPU", "GPU")
"""Resources that are shown; others too if they are the cluster's own."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A node: resources by Ray's names."""

    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    node_id: str = ""

    def may_hold(self, asks: Iterable[Ask]) -> bool:
        """Whether a part of one of the asks may go here: by labels, and by what the node has in all."""
        return any(
            matches(self.labels, ask.selector)
            and all(self.total.get(name, 0.0) >= amount for name, amount in ask.bundles[0].items())
            for ask in asks
        )


@dataclass(frozen=True)
class NodeType:
    """Nodes that could be added, up to ``most``."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    most: int


@dataclass(frozen=True)
class View:
    """A cluster at some moment."""

    nodes: Sequence[Node]
    types: Sequence[NodeType] = ()
    unknown: bool = False
    """Whether there may be an autoscaler that did not tell, or not all of, what it could add."""

    def labels(self) -> list[Mapping[str, str]]:
        """Of all nodes that there are or may be."""
        return [node.labels for node in self.nodes] + [kind.labels for kind in self.types]

    def grown(self, by: int) -> list[Node]:
        """The nodes, with up to ``by`` more of each type."""
        added = [
            Node(f"{kind.name} {number}", kind.resources, kind.resources, kind.labels)
            for kind in self.types
            for number in range(min(by, kind.most))
        ]
        return [*self.nodes, *added]


def look(joined: bool) -> View:
    """The cluster as it is now. A Ray of our own has no autoscaler. Blocks for seconds on one that is joined."""
    types = node_types() if joined else []
    return View(nodes_now(), types or [], types is None or any(not kind.resources for kind in types))


def nodes_now() -> list[Node]:
    """Those that are alive."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"],
            free.get(node["NodeID"], node["Resources"]),
            node["Labels"],
            node["NodeID"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def node_types() -> list[NodeType] | None:
    """What the autoscaler of the head could add; nothing if there is none, None if it cannot be asked."""
    import ray

    task: Any = ray.remote(_types_here).options(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)
    try:
        found: list[NodeType] = ray.get(task.remote(), timeout=ANSWER_SECONDS)
        return found
    except Exception as error:
        logger.info("the head did not tell what its autoscaler could add: %s", error)
        return None


def _types_here() -> list[NodeType]:
    """On the head: by the file that its autoscaler was started with, or by the cluster's resource in Kubernetes."""
    import os

    if os.environ.get("RAY_CLUSTER_NAME") and os.environ.get("KUBERNETES_SERVICE_HOST"):
        from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

        producer = AutoscalingConfigProducer(
            os.environ["RAY_CLUSTER_NAME"], os.environ.get("RAY_CLUSTER_NAMESPACE", "default")
        )
        return types_of(producer())
    import ray
    import yaml

    file = _autoscaler_file(ray.get_runtime_context().gcs_address)
    return [] if file is None else types_of(yaml.safe_load(file.read_text()))


def _autoscaler_file(gcs_address: str) -> Path | None:
    """The file of the autoscaler that works for this Ray, by its command line."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        options = dict(word.partition("=")[::2] for word in process.info["cmdline"] or () if "=" in word)
        if options.get("--gcs-address") == gcs_address and (file := options.get("--autoscaling-config")):
            return Path(file).expanduser()
    return None


def types_of(config: Mapping[str, Any]) -> list[NodeType]:
    """The kinds of workers in a cluster's file (``available_node_types``)."""
    head = config.get("head_node_type")
    return [
        NodeType(
            name,
            {resource: float(amount) for resource, amount in (kind.get("resources") or {}).items()},
            kind.get("labels") or {},
            int(kind.get("max_workers", config.get("max_workers", 0))),
        )
        for name, kind in (config.get("available_node_types") or {}).items()
        if name != head
    ]
