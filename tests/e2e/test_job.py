"""A run as a submitted Ray job, on a Ray that is there before and after it: stopped, and resumed from its URL."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lightning_ray.store import open_folder
from tests.e2e.submit import SECONDS, STEPS

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_job_is_stopped_and_resumed_elsewhere_and_takes_its_own_things_away(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lr-job-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        submitted = subprocess.run(
            [sys.executable, "-m", "tests.e2e.submit", temp, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=2 * SECONDS + 180,
        )
    assert submitted.returncode == 0, submitted.stderr
    result = json.loads(submitted.stdout.splitlines()[-1])
    first, second = result["jobs"]
    assert (first["state"], second["state"]) == ("STOPPED", "SUCCEEDED"), result["logs"]
    assert second["step"] is not None, result["logs"]
    assert second["resumes"] == first["id"] and 0 < first["step"] < second["step"] == second["steps"] == STEPS
    assert f"stopped after step {first['step']}, with a checkpoint" in result["logs"][0]
    assert all("\x1b" not in log and "Traceback" not in log for log in result["logs"]), result["logs"]
    assert result["applications"] == []
    assert not {"RunnerActor", "SpanStoreActor", "PolicyTrainer"} & set(result["actors"]), result["actors"]

    run = tmp_path / "remote" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(STEPS))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["swaps_proved"] == summary["swaps"]
    owner = json.loads((run / "owner.json").read_text())
    assert (owner["job"], owner["ended"]) == (second["id"], True)
    settled = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    played = [rollout for line in settled for _, members in line["groups"] for rollout in members]
    assert set(open_folder(run / "store").scan_spans(played)["rollout_id"].to_pylist()) == set(played)
