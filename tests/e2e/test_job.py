"""The same script as a submitted Ray job, on a Ray that is there before and after it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_submitted_job_trains_and_takes_its_own_things_away(tmp_path: Path) -> None:
    train = f"{sys.executable} -m lightning_ray.cli train tests/e2e/script.py --runs-dir {tmp_path}"
    train += " --set algorithm.steps=2 --set algorithm.ranks=1 -- one_word"
    with tempfile.TemporaryDirectory(prefix="lr-job-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        submitted = subprocess.run(
            [sys.executable, "-m", "tests.e2e.submit", temp, train],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert submitted.returncode == 0, submitted.stderr
    result = json.loads(submitted.stdout.splitlines()[-1])
    assert result["status"] == "SUCCEEDED", result["logs"]
    assert "step 2/2" in result["logs"]
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["swaps_proved"] == summary["swaps"]
    assert result["applications"] == []
    assert not {"RunnerActor", "SpanStoreActor", "PolicyTrainer"} & set(result["actors"]), result["actors"]
