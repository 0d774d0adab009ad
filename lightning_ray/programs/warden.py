"""The warden: the one small process that starts a runner's programs and outlives none of them.

Run as a script by ``process.Warden``, one for each runner process, with nothing but the standard library. It takes
orders as lines of JSON on a socket, each program's open files along with its order, and tells on the same socket
when a program started and how it ended. Invariant: when a program has ended, was stopped, or the runner is gone (its
end of the socket closes, however it died), nothing of that program is left: not its process group, and no process
that went off on its own, because the warden adopts those whose parents died (PR_SET_CHILD_SUBREAPER) and knows them by
a variable of their environment.

    {"id": 1, "order": "start"}  + stdin, stdout, stderr, a file with the specification   ->  started | failed
    {"id": 1, "order": "stop"}   SIGTERM to the group, SIGKILL after the grace             ->  ended

It is nobody's child: Ray kills the children of a worker that ends, and the warden still has work to do then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
FILES_PER_PROGRAM = 4
POLL_SECONDS = 0.005
GIVE_UP_SECONDS = 5.0
"""After SIGKILL: a process that is still there hangs in the kernel."""
CPU_GRACE_SECONDS = 2
"""Between SIGXCPU and SIGKILL for a program that used up its processor time."""

_prctl = ctypes.CDLL(None).prctl


class Program:
    """A program from its start until nothing of it is left."""

    def __init__(self, name: int, process: subprocess.Popen[bytes], specification: Mapping[str, Any]):
        self.name = name
        self.process = process
        self.mark = os.fsencode(specification["mark"])
        self.grace_seconds: float = specification["grace_seconds"]
        self.cleanup: list[str] = specification["cleanup"]
        self.scratch: str | None = specification["scratch"]
        self.stopped = False
        self.kill_at: float | None = None
        """When SIGKILL is due; None while it may run."""
        self.give_up_at = 0.0
        self.told: set[int] = set()
        """Strays that got SIGTERM."""
        self.ended: dict[str, Any] | None = None
        """How its first process ended."""

    def stop(self, grace_seconds: float) -> None:
        """SIGTERM now (and SIGCONT, for one that is suspended), SIGKILL after the grace."""
        if not self.stopped and self.ended is None:
            self.stopped = True
            self.signal_group(signal.SIGTERM)
            self.signal_group(signal.SIGCONT)
            self.finish_by(time.monotonic() + grace_seconds)

    def finish_by(self, kill_at: float) -> None:
        """What is left at that time is killed."""
        self.kill_at = kill_at
        self.give_up_at = kill_at + GIVE_UP_SECONDS

    def signal_group(self, number: int) -> bool:
        """Whether the process group still exists."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class Warden:
    """Programs by their pid, and the socket to the runner."""

    def __init__(self, control: socket.socket):
        self.control = control
        self.runner_is_gone = False
        self.programs: dict[int, Program] = {}
        self.cleaning: set[int] = set()
        self.unread = b""
        self.files: list[int] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, self.hear)
        self.woken, waker = os.pipe()
        for end in (self.woken, waker):
            os.set_blocking(end, False)
        self.selector.register(self.woken, selectors.EVENT_READ, lambda: os.read(self.woken, 4096))
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Until the runner is gone and nothing is left."""
        while not (self.runner_is_gone and not self.programs and not self.cleaning):
            for key, _ in self.selector.select(self.pause()):
                key.data()
            self.reap()
            self.press()
        signal_each(children(), signal.SIGKILL)

    def pause(self) -> float | None:
        """Seconds until something is due."""
        closing = [program for program in self.programs.values() if program.kill_at is not None]
        if not closing:
            return None
        if any(program.ended is not None for program in closing):
            return POLL_SECONDS
        return max(POLL_SECONDS, min(program.kill_at or 0.0 for program in closing) - time.monotonic())

    def hear(self) -> None:
        """Orders; the end of the socket is the end of the runner."""
        try:
            data, files, _, _ = socket.recv_fds(self.control, 65536, 64)
        except ConnectionError:
            data, files = b"", []
        self.files.extend(files)
        if not data:
            self.runner_is_gone = True
            self.selector.unregister(self.control)
            for program in self.programs.values():
                program.stop(program.grace_seconds)
            return
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if order["order"] == "start":
                files, self.files = self.files[:FILES_PER_PROGRAM], self.files[FILES_PER_PROGRAM:]
                self.start(order["id"], files)
            else:
                for program in self.programs.values():
                    if program.name == order["id"]:
                        program.stop(program.grace_seconds)

    def say(self, **message: Any) -> None:
        """Tell the runner, if there is one."""
        with contextlib.suppress(OSError):
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def start(self, name: int, files: list[int]) -> None:
        """Start a program in a session of its own."""
        stdin, stdout, stderr, order = files
        try:
            with open(order, encoding="utf-8") as file:
                specification = json.load(file)
            process = subprocess.Popen(
                specification["argv"],
                executable=specification["executable"],
                env=specification["env"],
                cwd=specification["cwd"],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=functools.partial(prepare, os.getpid(), specification),
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            text = getattr(error, "strerror", None) or str(error)
            self.say(id=name, failed=text, errno=getattr(error, "errno", None))
            return
        finally:
            for file_number in (stdin, stdout, stderr):
                os.close(file_number)
        self.programs[process.pid] = Program(name, process, specification)
        self.say(id=name, started=process.pid)

    def reap(self) -> None:
        """Take in whatever ended: programs, and orphans that were adopted."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            program = self.programs.get(found.si_pid)
            if program is None:
                os.waitpid(found.si_pid, 0)
                self.cleaning.discard(found.si_pid)
            else:
                self.first_process_ended(program)

    def first_process_ended(self, program: Program) -> None:
        """What it leaves behind is killed, now or, if it was stopped, after the grace."""
        if not program.stopped:
            program.signal_group(signal.SIGKILL)  # its pid is not reaped yet, so the group is surely its own
            program.finish_by(time.monotonic())
        _, status, usage = os.wait4(program.process.pid, 0)
        code = program.process.returncode = os.waitstatus_to_exitcode(status)
        program.ended = {"code": code, "cpu_s": usage.ru_utime + usage.ru_stime, "max_rss": usage.ru_maxrss * 1024}

    def press(self) -> None:
        """Kill what is due, and tell of programs of which nothing is left."""
        now = time.monotonic()
        for pid, program in list(self.programs.items()):
            if program.kill_at is None:
                continue
            left = program.ended is None or program.signal_group(0)
            strays = self.strays(program) if program.ended is not None or now >= program.kill_at else []
            if (left or strays) and now >= program.kill_at:
                program.signal_group(signal.SIGKILL)
                signal_each(strays, signal.SIGKILL)
                if program.ended is None:
                    program.kill_at = now + POLL_SECONDS
            else:
                signal_each([stray for stray in strays if stray not in program.told], signal.SIGTERM)
                program.told.update(strays)
            if program.ended is not None and (not (left or strays) or now >= program.give_up_at):
                del self.programs[pid]
                self.clean(program)
                self.say(id=program.name, ended=program.ended, stopped=program.stopped)

    def strays(self, program: Program) -> list[int]:
        """Adopted processes that are of this program."""
        found = []
        for pid in children():
            if pid not in self.programs and pid not in self.cleaning:
                with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
                    if program.mark in file.read().split(b"\0"):
                        found.append(pid)
        return found

    def clean(self, program: Program) -> None:
        """Run the cleanup of a program that was stopped: a container outlives its client."""
        if program.stopped and program.cleanup:
            self.run(program.cleanup)
        if self.runner_is_gone and program.scratch is not None:
            self.run(["rm", "-rf", program.scratch])

    def run(self, command: list[str]) -> None:
        """Start a command of our own, and wait for it before the end."""
        with contextlib.suppress(OSError):
            nothing = subprocess.DEVNULL
            process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
            process.returncode = 0  # reaped with the orphans
            self.cleaning.add(process.pid)


def prepare(warden: int, specification: Mapping[str, Any]) -> None:
    """In the new process, before it becomes the program: it dies with the warden, and first if memory ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != warden:
        os._exit(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if (size := specification["memory_bytes"]) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if (seconds := specification["cpu_seconds"]) is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + CPU_GRACE_SECONDS))


def signal_each(pids: list[int], number: int) -> None:
    """Those of them that are still there."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def children() -> list[int]:
    """Pids of this process's children."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def main(control: int) -> None:
    """Leave the runner's family and serve."""
    if os.fork():
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # those Python restores for programs
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs would inherit
    os.chdir("/")
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    Warden(socket.socket(fileno=control)).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
