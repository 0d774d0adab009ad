"""Processes are ended, and not waited for when nobody takes note of their end."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from lightning_ray.machine import end_processes, grown_from


def test_a_process_that_nobody_reaps_is_not_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # reaped below, not before
    process, began = psutil.Process(child.pid), time.monotonic()
    end_processes([process, process])
    assert process.status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 4, "the five seconds are for those that are still at work"
    child.wait()
    end_processes([process])


def test_only_what_has_grown_out_of_the_marked_is_found() -> None:
    sleeps = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeps!r}, 'grandchild'])"
    mine = subprocess.Popen([sys.executable, "-c", sleeps])
    marked = subprocess.Popen([sys.executable, "-c", parent, "--temp-dir=/tmp/lrr-of-the-run/session"])
    deadline = time.monotonic() + 20
    try:
        while len(found := grown_from("/tmp/lrr-of-the-run")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first, second = found
        assert first.pid == marked.pid and second.cmdline()[-1] == "grandchild"
        end_processes(found)
        assert mine.poll() is None
        assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE
    finally:
        for child in (mine, marked):
            child.kill()
            child.wait()
