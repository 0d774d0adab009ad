"""HAProxy as Serve starts it for us: what it says before it knows an application, and how it ends with its keeper."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deployments.haproxy import haproxy_environment
from lightning_ray.net import free_port

CONFIG = """
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
frontend door
    bind *:{port}
    {rules}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain string "not found"
backend known
    server one 127.0.0.1:1
frontend prometheus
    bind :{metrics}
listen stats
  bind *:{statistics}
"""
KEEPER = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(60)"


class Door:
    """HAProxy by our wrapper, kept by a process of its own."""

    def __init__(self, folder: Path, rules: str = ""):
        told = haproxy_environment(folder)
        self.port = free_port("127.0.0.1")
        self.own = [told[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("METRICS", "STATS")]
        self.config = folder / "door.cfg"
        metrics, statistics = self.own
        self.config.write_text(CONFIG.format(port=self.port, rules=rules, metrics=metrics, statistics=statistics))
        wrapper = told["RAY_SERVE_HAPROXY_BINARY_PATH"]
        command = [sys.executable, "-c", KEEPER, wrapper, "-db", "-f", str(self.config)]
        self.keeper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | told)
        assert self.keeper.stdout is not None
        self.haproxy = psutil.Process(int(self.keeper.stdout.readline()))

    def status(self) -> int:
        """Of a path that no application has, once it listens."""
        deadline = time.monotonic() + 20
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/elsewhere")
                return connection.getresponse().status
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            finally:
                connection.close()

    def kill_keeper(self) -> None:
        os.kill(self.keeper.pid, signal.SIGKILL)
        self.keeper.wait()

    def has_ended(self) -> bool:
        deadline = time.monotonic() + 20
        while self.haproxy.is_running() and self.haproxy.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                self.haproxy.kill()
                return False
            time.sleep(0.05)
        return True


@pytest.mark.parametrize(
    ("rules", "status"),
    [("", 503), ("# mirrors the use_backend rules below", 503), ("use_backend known if { path_beg /known }", 404)],
)
def test_a_door_that_knows_no_application_yet_cannot_answer_and_ends_with_its_keeper(
    tmp_path: Path, rules: str, status: int
) -> None:
    door = Door(tmp_path, rules)
    try:
        assert door.status() == status
        listening = {
            (at.laddr.ip, str(at.laddr.port)) for at in door.haproxy.net_connections() if at.status == "LISTEN"
        }
        assert listening == {("0.0.0.0", str(door.port)), *(("127.0.0.1", port) for port in door.own)}, (
            "what is for other nodes must be heard there, and nothing else"
        )
    finally:
        door.kill_keeper()
        assert door.has_ended()


def test_two_runs_of_a_machine_share_no_port(tmp_path: Path) -> None:
    from ray.serve._private import constants

    fixed = {
        name
        for name in vars(constants)
        if name.startswith("RAY_SERVE_") and name.endswith("_PORT") and isinstance(getattr(constants, name), int)
    }
    ranges = {name for name in fixed if "_MIN_" in name or "_MAX_" in name}
    first, second = (haproxy_environment(tmp_path / name) for name in ("one", "two"))
    assert fixed - ranges <= first.keys(), "Serve would listen there in every run"
    ports = [each[name] for each in (first, second) for name in each if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) > 6
