"""Simulated nodes are started again where Ray failed at them, and nothing of the first try is left; real Ray."""

from __future__ import annotations

import tempfile
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

from benchmarks.simulated import simulated_cluster
from lightning_ray.machine import grown_from

STORE = 80_000_000


def test_a_head_and_a_node_that_came_too_late_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wait, late, tries = Cluster._wait_for_node, list[psutil.Process](), list[int]()

    def first_is_late(cluster: Any, node: Any, *given: Any) -> None:
        wait(cluster, node, *given)
        tries.append(len(cluster.list_all_nodes()))
        if len(tries) % 2:
            late.append(psutil.Process(node.all_processes["raylet"][0].process.pid))
            raise TimeoutError("The current node timed out during startup.")

    monkeypatch.setattr(Cluster, "_wait_for_node", first_is_late)
    with tempfile.TemporaryDirectory(prefix="lr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = simulated_cluster(num_cpus=1, include_dashboard=False, object_store_memory=STORE, temp_dir=folder)
        try:
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
            assert tries == [1, 1, 2, 2]
            assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in late)
            cluster.wait_for_nodes()
        finally:
            cluster.shutdown()
        assert not grown_from(folder)
