"""One program, run to its end: started by the warden, drained, stopped at its time limit or when its task is cancelled.

There is no child watcher and no child of this process, so it works in the loop of any thread. What the program is
given and what its end means are others' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_ray.errors import InfrastructureError
from lightning_ray.programs.output import Drain
from lightning_ray.programs.per_loop import PerLoop

START_SECONDS = 60.0
DRAIN_SECONDS = 2.0
STOP_SECONDS = 10.0
"""Beyond the grace, for the warden to tell that nothing is left."""


class NotStartedError(Exception):
    """The operating system refused to start the program."""

    def __init__(self, text: str, errno: int | None):
        super().__init__(text)
        self.errno = errno


@dataclass(frozen=True)
class Specification:
    """What is started, and under which limits."""

    argv: Sequence[str]
    executable: str
    env: Mapping[str, str]
    cwd: str
    mark: str
    """``NAME=value`` of ``env`` that no other program has: processes that leave the group are known by it."""
    grace_seconds: float = 2.0
    """Between SIGTERM and SIGKILL."""
    memory_bytes: int | None = None
    """Address space of each process."""
    cpu_seconds: int | None = None
    cleanup: Sequence[str] = ()
    """A command that is run if the program had to be stopped."""
    scratch: str | None = None
    """A folder that is removed if this process is gone when the program has ended."""


@dataclass(frozen=True)
class Ended:
    """How the first process of a program ended."""

    code: int
    """The exit code, or minus the number of the signal that ended it."""
    stopped: bool
    """Whether it was told to end."""
    cpu_seconds: float
    max_rss_bytes: int


@dataclass(eq=False)
class Running:
    """A program that the warden was told to start."""

    name: int
    started: asyncio.Future[int]
    ended: asyncio.Future[Ended]


class Warden:
    """This loop's line to its warden process, which is started with it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._control, far_end = socket.socketpair()
        self._programs: dict[int, Running] = {}
        self._names = 0
        self._unread = b""
        script = str(Path(__file__).with_name("warden.py"))
        with far_end:
            self._launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", script, str(far_end.fileno())],
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control.setblocking(False)
        Context().run(self._loop.add_reader, self._control, self._hear)

    @property
    def alive(self) -> bool:
        """Whether the warden is there."""
        return self._control.fileno() >= 0

    def close(self) -> None:
        """Let the warden go; it ends what still runs."""
        self._control.close()

    async def start(self, specification: Specification, files: Sequence[int]) -> Running:
        """Order the start of a program with its standard files; its futures tell what comes of it."""
        self._names += 1
        running = Running(self._names, self._loop.create_future(), self._loop.create_future())
        with tempfile.TemporaryFile() as order:
            order.write(json.dumps(asdict(specification)).encode())
            order.seek(0)
            await self._order(running.name, "start", [*files, order.fileno()])
        self._programs[running.name] = running
        return running

    async def _order(self, name: int, order: str, files: Sequence[int] = ()) -> None:
        line = json.dumps({"id": name, "order": order}).encode() + b"\n"
        while True:
            try:
                socket.send_fds(self._control, [line], files)
                return
            except BlockingIOError:
                await asyncio.sleep(0.005)
            except OSError as error:
                raise InfrastructureError(f"the warden of this process's programs is gone: {error}") from error

    def stop(self, running: Running) -> None:
        """Have a program ended."""
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [json.dumps({"id": running.name, "order": "stop"}).encode() + b"\n"], [])

    def _hear(self) -> None:
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        if self._launcher.returncode is None:
            self._launcher.wait()  # it ended before the warden spoke
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._told(json.loads(line))

    def _told(self, message: Mapping[str, Any]) -> None:
        running = self._programs[message["id"]]
        if (pid := message.get("started")) is not None:
            settle(running.started, pid)
            return
        del self._programs[running.name]
        if (text := message.get("failed")) is not None:
            settle(running.started, NotStartedError(text, message["errno"]))
            settle(running.ended, NotStartedError(text, message["errno"]))
        else:
            end = message["ended"]
            settle(running.ended, Ended(end["code"], message["stopped"], end["cpu_s"], end["max_rss"]))

    def _lost(self) -> None:
        self._loop.remove_reader(self._control)
        self._control.close()
        self._launcher.wait()
        for running in self._programs.values():
            error = InfrastructureError(
                "the warden, the process that watches over this runner's programs, died; they were killed"
            )
            if running.started.done() and not running.started.exception():
                with contextlib.suppress(OSError):
                    os.killpg(running.started.result(), signal.SIGKILL)
            settle(running.started, error)
            settle(running.ended, error)
        self._programs.clear()


def settle(future: asyncio.Future[Any], outcome: Any) -> None:
    """Set a future that nobody may be waiting for."""
    if not future.done():
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
            future.exception()
        else:
            future.set_result(outcome)


wardens = PerLoop(Warden)


@dataclass(eq=False)
class Program:
    """A program's run; what is known of it can be read at any time."""

    specification: Specification
    stdin: bytes = b""
    ended: Ended | None = None
    timed_out: bool = False
    duration_s: float = 0.0
    stdout: str = ""
    stderr: str = ""
    _drains: list[Drain] = field(default_factory=list)

    async def run(self, timeout_seconds: float | None = None) -> None:
        """To the end, after which nothing of it is left. Raises NotStartedError, or InfrastructureError."""
        begun = time.monotonic()
        warden = wardens.here()
        self._drains = [Drain(), Drain()]
        try:
            with tempfile.TemporaryFile() as stdin, contextlib.ExitStack() as ends:
                for drain in self._drains:
                    ends.callback(os.close, drain.write_end)
                stdin.write(self.stdin)
                stdin.seek(0)
                running = await warden.start(self.specification, [stdin.fileno(), *(d.write_end for d in self._drains)])
            await self._watch(warden, running, timeout_seconds)
            await asyncio.gather(*(drain.end(DRAIN_SECONDS) for drain in self._drains))
        finally:
            for drain in self._drains:
                drain.close()
            self.duration_s = time.monotonic() - begun
            self.stdout, self.stderr = (drain.kept.text() for drain in self._drains)

    async def _watch(self, warden: Warden, running: Running, timeout_seconds: float | None) -> None:
        try:
            await asyncio.wait({running.started}, timeout=START_SECONDS)
            if running.started.done():
                running.started.result()
                await asyncio.wait({running.ended}, timeout=timeout_seconds)
            if not running.ended.done():
                self.timed_out = running.started.done()
                warden.stop(running)
                await asyncio.wait({running.ended}, timeout=self._stop_seconds)
        except asyncio.CancelledError:
            warden.stop(running)
            await self._stopped(running)
            raise
        if not running.ended.done():
            raise InfrastructureError(self._hangs(running))
        self.ended = running.ended.result()

    def _hangs(self, running: Running) -> str:
        name = repr(self.specification.executable)
        if not running.started.done():
            return f"{name} was not started within {START_SECONDS:.0f} s"
        return f"a process of {name} was still there {self._stop_seconds:.0f} s after it was told to stop"

    @property
    def _stop_seconds(self) -> float:
        return self.specification.grace_seconds + STOP_SECONDS

    async def _stopped(self, running: Running) -> None:
        """Wait for the end of a program whose task is cancelled, however often."""
        give_up = time.monotonic() + self._stop_seconds
        while not running.ended.done() and (left := give_up - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({running.ended}, timeout=left)
        if running.ended.done() and not running.ended.exception():
            self.ended = running.ended.result()
        await asyncio.sleep(0)  # what it printed last is read
