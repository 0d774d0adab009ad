"""Processes are ended, and not waited for when nobody takes note of their end."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from lightning_ray.machine import end_processes


def test_a_process_that_nobody_reaps_is_not_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # reaped below, not before
    process, began = psutil.Process(child.pid), time.monotonic()
    end_processes([process, process])
    assert process.status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 4, "the five seconds are for those that are still at work"
    child.wait()
    end_processes([process])
