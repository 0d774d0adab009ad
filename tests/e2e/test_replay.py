"""``lightning-ray replay`` on runs as a user makes them: the same figures, and others with other settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = """
import lightning_ray as lr
from tests.e2e.tiny import make_tiny_model, two_turns

tasks = [{"question": f"w{i} w{i + 1}", "length": 6 + i % 12} for i in range(10)]
algorithm = lr.GRPO(
    model=make_tiny_model,
    steps=4,
    prompts_per_step=3,
    group_size=4,
    minibatch_rollouts=5,
    epochs=2,
    learning_rate=2e-3,
    warmup_steps=1,
    checkpoint_every=2,
    rollout_timeout_seconds=60,
    engine=lr.EngineSettings(max_model_len=128, kv_cache_memory_mb=16),
)
lr.Trainer(algorithm=algorithm, n_runners=1, name="tiny").fit(two_turns, train_dataset=tasks)
"""
FIGURES = {"loss", "grad_norm", "clip_share", "approx_kl", "entropy", "max_logprob_diff", "trained_tokens"}


def lightning_ray(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lightning_ray.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def replay(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = lightning_ray(folder, "replay", *arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def train(folder: Path, *settings: str) -> Path:
    (folder / "train.py").write_text(SCRIPT)
    done = lightning_ray(folder, "train", "train.py", *(part for text in settings for part in ("--set", text)))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "tiny"


def test_a_step_replays_to_the_same_figures_and_with_other_settings_to_others(tmp_path: Path) -> None:
    run = train(tmp_path, "algorithm.ranks=1")
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = {row["step"]: row for row in recorded if row["kind"] == "train"}
    for step, start in ((2, "checkpoints/step-000002"), (1, "the initial model"), (3, "checkpoints/step-000002")):
        told = replay(tmp_path, "runs/tiny", "--step", str(step))
        assert told["from"] == start and told["agrees"] and told["tolerance"] == 1e-6
        assert {*told["figures"]} >= FIGURES and told["trained_otherwise"] == {}
        for name in FIGURES:
            value = rows[step][f"update.{name}"]
            assert told["figures"][name]["replayed"] == pytest.approx(value, rel=1e-6, abs=1e-6), name

    told = replay(tmp_path, "--step", "2", "--set", "algorithm.loss=cispo", "--set", "algorithm.learning_rate=0.5")
    loss, rate = told["figures"]["loss"], told["figures"]["learning_rate"]
    assert told["agrees"] and loss["recorded"] == pytest.approx(loss["replayed"], abs=1e-6)
    assert abs(loss["changed"] - loss["replayed"]) > 1e-5 and (rate["replayed"], rate["changed"]) == (2e-3, 0.5)
    shown = lightning_ray(tmp_path, "replay", "--step", "2", "--set", "algorithm.loss=cispo")
    for part in ("recorded settings", "changed settings", "max_logprob_diff", "the figures are the run's"):
        assert part in shown.stdout, shown.stdout + shown.stderr

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["algorithm"]["clip_high"] = config["algorithm"]["clip_low"] = 1e-3
    (copy / "config.json").write_text(json.dumps(config))
    told = replay(tmp_path, "copy", "--step", "2", code=1)
    assert not told["agrees"] and "clip_share" in told["differing"]["2"]


def test_two_asynchronous_ranks_replay_on_one(tmp_path: Path) -> None:
    train(tmp_path, "algorithm.ranks=2", "algorithm.max_staleness=1")
    for step, start in ((2, "checkpoints/step-000002"), (3, "checkpoints/step-000002")):
        told = replay(tmp_path, "runs/tiny", "--step", str(step))
        assert told["from"] == start and told["agrees"] and told["ranks"] == 2 and told["tolerance"] == 1e-4
        assert told["figures"]["trained_tokens"]["difference"] == 0 and told["trained_otherwise"] == {}
