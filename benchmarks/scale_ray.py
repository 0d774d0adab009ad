"""A Ray of several nodes on this machine: each with a raylet and an object store of its own."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray

from benchmarks.simulated import simulated_cluster
from benchmarks.store import cluster

NODE_CPUS = 2
OBJECT_STORE_BYTES = 300_000_000


@contextlib.contextmanager
def ray_of(nodes: int) -> Iterator[Path]:
    """A Ray of so many nodes, and a folder for everything; both are gone afterwards."""
    if nodes == 1:
        with cluster() as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="lr-"))
    sizes = {"num_cpus": NODE_CPUS, "object_store_memory": OBJECT_STORE_BYTES}
    simulated = simulated_cluster(**sizes, include_dashboard=False, temp_dir=str(folder / "ray"))
    try:
        for _ in range(nodes - 1):
            simulated.add_node(**sizes)
        ray.init(simulated.address, log_to_driver=False, logging_level="ERROR")
        yield folder
    finally:
        ray.shutdown()
        simulated.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
