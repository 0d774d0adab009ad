"""Starts a Ray with a job server, submits a training, stops it, loses its disk, resumes it, and prints as JSON what
came of it.

A process of its own: one that has used gRPC forks badly, and Ray's clients keep its state in the process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ray
from ray import serve
from ray.util.state import list_actors

from benchmarks.simulated import twice
from lightning_ray.jobs import Job, Jobs

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 480
"""For a job to come to where it is waited for: twice."""
STEPS = 30
"""Enough that the job can be stopped amid them."""
SETTINGS = {"steps": STEPS, "ranks": 1, "checkpoint_every": 99}


def main(temp: str, folder: str) -> None:
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    starting = partial(
        ray.init,
        "local",
        num_cpus=16,
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=200_000_000,
        _temp_dir=temp,
        log_to_driver=False,
    )
    context = twice(starting, ray.shutdown)
    jobs = Jobs(f"http://{context.dashboard_url}")
    arguments = ["tests/e2e/script.py", "--runs-dir", f"file://{folder}/remote"]
    for name, value in SETTINGS.items():
        arguments += ["--set", f"algorithm.{name}={value}"]
    first = jobs.submit([*arguments, "--", "one_word"], ROOT, {"LIGHTNING_RAY_CACHE": f"{folder}/cache"})
    wait(jobs, first, lambda job: job.step is not None)
    jobs.stop(first)
    shutil.rmtree(f"{folder}/cache")
    second = jobs.resume(first, ROOT)
    wait(jobs, second, lambda job: job.ended)
    result = {
        "jobs": [asdict(job) for job in jobs.all()],
        "logs": [jobs.logs(first), jobs.logs(second)],
        "actors": [actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])],
        "applications": list(serve.status().applications),
    }
    print(json.dumps(result))
    ray.shutdown()


def wait(jobs: Jobs, job: str, over: Callable[[Job], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not (over(known := jobs.get(job)) or known.ended) and time.monotonic() < deadline:
        time.sleep(0.3)


if __name__ == "__main__":
    main(*sys.argv[1:])
