"""Several nodes on this machine (``ray.cluster_utils.Cluster``), and the training run's process, its driver.

The head node has no CPUs: there are the driver, the span store, Serve's controller and its proxy. All else is on worker
nodes, which come and go.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray import serve

from benchmarks.simulated import simulated_cluster
from deployments.haproxy import haproxy_environment
from lightning_ray.machine import environment, short_temp
from lightning_ray.net import free_port

HOST = "127.0.0.1"
NODE_CPUS = 6
"""Enough for everything that a run has, so that any worker node can be lost."""
SYSTEM = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
"""A node is given up after three seconds; Ray's defaults take fifteen."""
LIMIT_SECONDS = 60.0


class Actor(NamedTuple):
    """An actor that lives: its name without the run's, its process, and its node's (hex) id."""

    name: str
    pid: int
    node_id: str


class Nodes:
    """The cluster, with this process connected to it."""

    def __init__(self) -> None:
        self.temp = Path(tempfile.mkdtemp(prefix="lr-", dir=short_temp()))
        self._front_door = haproxy_environment(self.temp / "haproxy")
        self._cluster: Any = None

    def start(self, workers: int) -> None:
        """The head, so many worker nodes, and Serve."""
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        with environment(self._front_door):
            self._cluster = simulated_cluster(
                num_cpus=0,
                include_dashboard=False,
                object_store_memory=2**28,
                temp_dir=str(self.temp),
                _system_config=SYSTEM,
            )
        for _ in range(workers):
            self.add()
        ray.init(self.address, namespace="chaos", log_to_driver=False, logging_level="ERROR")
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": HOST, "port": free_port(HOST)},
            logging_config={"log_level": "ERROR"},
        )

    @property
    def address(self) -> str:
        """Of Ray."""
        return str(self._cluster.address)

    def add(self) -> None:
        """One more worker node. In the main thread: its processes end with the one that starts them."""
        with environment(self._front_door):
            self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=2**28, include_dashboard=False)

    def workers(self) -> list[str]:
        """The (hex) ids of the worker nodes."""
        return [node.node_id for node in self._cluster.worker_nodes]

    def kill(self, node_id: str) -> float:
        """Lose a worker node: all its processes, at once. When that was, in Unix seconds."""
        [node] = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        at = kill(raylet.pid, *(child.pid for child in raylet.children(recursive=True)))
        self._cluster.remove_node(node, allow_graceful=False)
        return at

    def stop(self) -> None:
        """End everything."""
        grown = psutil.Process().children(recursive=True)
        ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()
        gone(grown, 0.0)
        shutil.rmtree(self.temp, ignore_errors=True)


def actors(kind: str) -> list[Actor]:
    """The actors of a class that live, of whatever job."""
    found = ray._private.state.actors(actor_state_name="ALIVE").values()
    return [
        Actor(actor["Name"].rpartition("/")[2], actor["Pid"], actor["Address"]["NodeID"])
        for actor in found
        if actor["ActorClassName"].startswith(kind)
    ]


def kill(*pids: int) -> float:
    """kill -9; when that was, in Unix seconds."""
    at = time.time()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return at


def gone(processes: list[psutil.Process], seconds: float) -> list[str]:
    """Wait until all have ended; the command lines of those that had not by then, which are ended now."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    left = []
    for process in alive:
        try:
            left.append(" ".join(process.cmdline())[:100] or process.name())
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return left


class Driver:
    """The process of a training run; what it says goes to ``log``."""

    def __init__(self, command: list[str], log: Path):
        self.began = time.time()
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def tree(self) -> list[psutil.Process]:
        """All that grew out of it."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def check(self) -> None:
        """Raises RuntimeError, with the end of what it said, if it has ended badly."""
        if self._process.poll() not in (None, 0):
            raise RuntimeError(f"the run ended ({self._process.returncode}): {self._log.read_text()[-3000:]}")

    @property
    def has_ended(self) -> bool:
        """Whether it has come to its end."""
        self.check()
        return self._process.poll() is not None

    def kill(self) -> float:
        """kill -9; when that was."""
        at = time.time()
        self._process.kill()
        self._process.wait()
        return at

    def stop(self) -> None:
        """End it in order, or else at once."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()


def train(
    folder: Path,
    kind: str,
    model: Path,
    notes: Path,
    *,
    steps: int,
    name: str = "chaos",
    address: str | None = None,
    resume: bool = False,
) -> Driver:
    """Start or resume the run ``name`` in ``folder``, on the Ray of ``address`` or one of its own."""
    command = [sys.executable, "-m", "lightning_ray.cli", "train", "benchmarks/chaos_train.py"]
    command += ["--name", name, "--runs-dir", str(folder), "--set", f"algorithm.steps={steps}"]
    command += ["--resume"] * resume + ["--", kind, str(model), str(notes)]
    return Driver(command + ([] if address is None else [address]), folder / f"{name}.log")
