"""Starts a Ray with a job server, submits a command to it, and prints what came of it as JSON.

A process of its own: one that has used gRPC forks badly, and Ray's clients keep its state in the process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray
from ray import serve
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 240


def main(temp: str, command: str) -> None:
    context = ray.init(
        "local",
        num_cpus=16,
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=200_000_000,
        _temp_dir=temp,
        log_to_driver=False,
    )
    client = JobSubmissionClient(f"http://{context.dashboard_url}")
    excludes = [".git", ".venv", "runs"]
    job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT), "excludes": excludes})
    deadline = time.monotonic() + SECONDS
    ended = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}
    while client.get_job_status(job) not in ended and time.monotonic() < deadline:
        time.sleep(1)
    result = {
        "status": str(client.get_job_status(job).value),
        "logs": client.get_job_logs(job),
        "actors": [actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])],
        "applications": list(serve.status().applications),
    }
    print(json.dumps(result))
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
