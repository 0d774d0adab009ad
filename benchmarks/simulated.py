"""Several nodes of Ray on one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

from lightning_ray.machine import end_processes
from lightning_ray.own_ray import TRIES

Started = TypeVar("Started")


def simulated_cluster(**head: Any) -> Any:
    """``ray.cluster_utils.Cluster`` with a head of these settings; it may be the first Ray of the machine."""
    # Where Ray notes the cluster's address, whatever the head's temp_dir is, without making the folder.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    return SimulatedCluster(initialize_head=True, head_node_args=head)


class SimulatedCluster(Cluster):
    """Starts a node again where Ray failed at it, the head among them."""

    def add_node(self, wait: bool = True, **node: Any) -> Any:
        known = self.list_all_nodes()

        def end() -> None:
            for each in self.list_all_nodes():
                if each not in known:
                    self.remove_node(each, allow_graceful=False)

        add = super().add_node
        return twice(lambda: add(wait, **node), end)


def twice(start: Callable[[], Started], end: Callable[[], None]) -> Started:
    """What ``start`` gives; where it failed, ``end``, the end of the processes that it began, and another try."""
    for left in reversed(range(TRIES)):
        before = psutil.Process().children()
        try:
            return start()
        except BaseException as error:
            fresh = [child for child in psutil.Process().children() if child not in before]
            grown = [each for child in fresh for each in (child, *child.children(recursive=True))]
            end()
            end_processes(grown)
            if not (left and isinstance(error, Exception)):
                raise
    raise AssertionError
