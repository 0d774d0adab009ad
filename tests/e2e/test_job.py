"""The same script as a submitted Ray job, on a Ray that is there before and after it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the job server of a Ray of this test's own."""
    import ray

    temp = Path("/tmp") / f"lr-job-{os.getpid()}"
    context = ray.init(
        "local",
        num_cpus=16,
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=200_000_000,
        _temp_dir=str(temp),
        log_to_driver=False,
    )
    try:
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


def test_a_submitted_job_trains_and_takes_its_own_things_away(dashboard: str, tmp_path: Path) -> None:
    import ray
    from ray import serve
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(dashboard)
    command = f"{sys.executable} -m lightning_ray.cli train tests/e2e/script.py --runs-dir {tmp_path}"
    job = client.submit_job(
        entrypoint=f"{command} --set algorithm.steps=2 --set algorithm.ranks=1 -- one_word",
        runtime_env={"working_dir": str(ROOT), "excludes": [".git", ".venv", "runs"]},
    )
    deadline = time.monotonic() + 240
    while client.get_job_status(job) not in {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}:
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(1)
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs
    assert "step 2/2" in logs
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["swaps_proved"] == summary["swaps"]
    assert serve.status().applications == {}
    alive = [actor["class_name"] for actor in ray.util.state.list_actors(filters=[("state", "=", "ALIVE")])]
    assert not {"RunnerActor", "SpanStoreActor", "PolicyTrainer"} & set(alive), alive
