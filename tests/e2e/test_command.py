"""The command as a user types it: it learns, ends cleanly when interrupted, resumes, and explains what it refuses.

Each run is a process of its own with a real Ray, Serve, vLLM and two ranks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "tests/e2e/script.py"
INTERRUPTED = 130
MARK = "LIGHTNING_RAY_TEST"


def command(folder: Path, *arguments: str) -> list[str]:
    """``lightning-ray`` in a folder of its own: runs/ is made there."""
    return [sys.executable, "-m", "lightning_ray.cli", "train", str(ROOT / SCRIPT), "--name", "tiny", *arguments]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), MARK: str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder, *arguments),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_behind(folder: Path) -> list[str]:
    """Processes that carry this test's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except psutil.Error:
            continue
    return found


def finish(process: subprocess.Popen[str], folder: Path, timeout: float = 300) -> str:
    """The output of an ended run, which must have left nothing behind."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    time.sleep(0.5)
    assert left_behind(folder) == []
    return output


def doctor(folder: Path) -> str:
    """What ``lightning-ray doctor --json`` tells of a run."""
    arguments = [sys.executable, "-m", "lightning_ray.cli", "doctor", str(folder), "--json"]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT).stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "runs" / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_it_learns_although_interrupted_in_the_middle(tmp_path: Path) -> None:
    first = start(tmp_path, "--", "one_word")
    deadline = time.monotonic() + 240
    while len(metrics(tmp_path)) < 4:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "no fourth step in four minutes"
        time.sleep(0.2)
    asked = time.monotonic()
    first.send_signal(signal.SIGINT)
    output = finish(first, tmp_path, timeout=60)
    assert time.monotonic() - asked < 45
    assert first.returncode == INTERRUPTED, output
    assert "--resume" in output and "Traceback" not in output, output
    done = len(metrics(tmp_path))
    assert done < 12

    second = start(tmp_path, "--resume", "--", "one_word")
    output = finish(second, tmp_path)
    assert second.returncode == 0, output
    assert "Traceback" not in output, output
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(12))
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.5, rewards
    assert all(row.get("update.max_logprob_diff", 0) < 1e-4 for row in rows)

    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert summary["steps"] == 12 and summary["swaps"] == summary["swaps_proved"] >= 5
    assert summary["rollouts"] == 12 * 64
    assert summary["rollouts_trained"] + sum(summary["rollouts_dropped"].values()) == summary["rollouts"]
    assert summary["max_logprob_diff"] < 1e-4 and 0 < summary["peak_memory_gb"] < 8
    folder = tmp_path / "runs/tiny"
    assert (folder / "reward.png").stat().st_size > 5000
    assert list((folder / "tensorboard").glob("events*")) and (folder / "config.json").is_file()

    from transformers import AutoModelForCausalLM

    from lightning_ray.store import open_folder

    AutoModelForCausalLM.from_pretrained(folder / "checkpoints/step-000012")
    assert open_folder(folder / "store").statistics()
    told = json.loads(doctor(folder))
    verdicts = Counter(each["reason"] for each in told["diagnoses"] if each["step"] is not None)
    assert told["contradictions"] == [] and verdicts.pop("trained") == summary["rollouts_trained"]
    assert verdicts == summary["rollouts_dropped"]
    assert len(told["diagnoses"]) == told["rollouts"] == len(open_folder(folder / "store").query_rollouts())


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("raises", 'KeyError: "the agent\'s own defect"'),
        ("returns_text", "agent 'returns_text' returned str 'a string'"),
    ],
)
def test_a_broken_agent_stops_the_run_with_its_reason(tmp_path: Path, agent: str, expected: str) -> None:
    process = start(tmp_path, "--set", "algorithm.ranks=1", "--", agent)
    output = finish(process, tmp_path)
    assert process.returncode == 1
    assert expected in output and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("error: "), output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "algorithm.model=/no/such/model", "--", "one_word"], "/no/such/model"),
        (["--set", "algorithm.stepz=3", "--", "one_word"], "did you mean 'steps'?"),
        (["--set", "algorithm.engine.portt=3", "--", "one_word"], "did you mean 'port'?"),
        (["--set", "runners=3", "--", "one_word"], "did you mean 'n_runners'?"),
        (["--set", "algorithm.group_size=1", "--", "one_word"], "algorithm.group_size=1: input should be greater"),
        (["--", "one_word", "--empty"], "train_dataset is empty"),
        (["--set", "algorithm.engine.kv_cache_memory_mb=99999999", "--", "one_word"], "too little memory"),
        (["--resume", "--", "one_word"], "no finished checkpoint"),
    ],
)
def test_bad_input_is_refused_by_name_before_anything_starts(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    process = start(tmp_path, *arguments)
    output = finish(process, tmp_path, timeout=60)
    assert process.returncode == 2
    assert expected in output and "Traceback" not in output, output
    assert output.startswith("error: "), output


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(tmp_path, "--set", f"algorithm.engine.port={port}", "--", "one_word")
        output = finish(process, tmp_path, timeout=60)
    assert process.returncode == 2
    assert f"engine.port={port}" in output and "Traceback" not in output, output
