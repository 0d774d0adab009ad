"""This machine: whether it has the port and the memory that a run asks for, its processes and their environment."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import psutil

from lightning_ray.config import EngineSettings
from lightning_ray.errors import ConfigError

BASE_MEMORY = int(1.5 * 2**30)
REPLICA_MEMORY = int(0.9 * 2**30)
"""With the engine in its process; in its own, half as much again."""
RANK_MEMORY = int(0.8 * 2**30)
END_SECONDS = 5.0


def check_port(settings: EngineSettings) -> None:
    """Raises ConfigError when the wanted port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"engine.port={settings.port} on {settings.host} cannot be used ({error.strerror}); "
                "choose another, or 0 for a free one"
            ) from None


def check_memory(engines: Sequence[EngineSettings], ranks: int) -> None:
    """Raises ConfigError when this machine has not the memory that a small local run takes, ``ranks`` in all."""
    replicas = sum(engine.replicas for engine in engines)
    on_cpu = [engine for engine in engines if engine.device == "cpu"]
    caches = sum(engine.replicas * (engine.chosen_kv_cache_mb or 0) * 2**20 for engine in on_cpu)
    needed = BASE_MEMORY + replicas * REPLICA_MEMORY + caches + ranks * RANK_MEMORY
    free = psutil.virtual_memory().available
    if free < needed:
        raise ConfigError(
            f"too little memory: about {needed / 2**30:.1f} GB are needed for {replicas} replica(s) and "
            f"{ranks} trainer rank(s), {free / 2**30:.1f} GB are available; close other programs, or use ranks=1 and a "
            "smaller engine.kv_cache_memory_mb"
        )


def short_temp() -> str:
    """A temporary folder whose path leaves room for Ray's socket names (107 bytes)."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < 30 else "/tmp"


def grown_from(mark: str) -> list[psutil.Process]:
    """The children of this process whose command lines name ``mark``, and all that has grown out of them."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(mark in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Make sure that these very processes have ended; within five seconds, if the system lets them."""
    for process in processes:
        try:
            if process.is_running():
                process.kill()
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + END_SECONDS
    while any(_is_at_work(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_at_work(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended stays a zombie where the first process of a container reaps none."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tree_memory() -> int:
    """Bytes of this process and all that grew out of it, shared pages counted once (PSS)."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


@contextlib.contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """These variables for processes that are started within; None hides one."""
    before = {name: os.environ.get(name) for name in variables}
    set_environment(variables)
    try:
        yield
    finally:
        set_environment(before)


def set_environment(variables: Mapping[str, str | None]) -> None:
    """Set these variables; None unsets one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
