"""The algorithms of docs/algorithms.md as they stand there: real Ray, vLLM and a trainer rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs_code import blocks
from tests.e2e.tiny import make_tiny_model

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent


def call(folder: Path, *arguments: str, code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def lightning_ray(folder: Path, *arguments: str, code: int = 0) -> str:
    return call(folder, "-m", "lightning_ray.cli", *arguments, code=code)


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def test_reinforce_of_the_page_learns_resumes_and_replays(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "reinforce.py").write_text(blocks("algorithms.md")[1])
    run = tmp_path / "runs" / "reinforce"
    settings = ("--set", "algorithm.checkpoint_every=3", "--set", "algorithm.validate_every=3")
    lightning_ray(tmp_path, "train", "reinforce.py", *settings, "--set", "algorithm.steps=3", "--", "model")
    baseline = json.loads((run / "checkpoints/step-000003/run_state.json").read_text())["flow"]["memory"]["baseline"]
    assert 0 < baseline < 1

    told = lightning_ray(tmp_path, "train", "reinforce.py", *settings, "--resume", "--", "model")
    assert "sampled success before and after:" in told
    trained = rows(run)
    assert [row["step"] for row in trained] == list(range(8))
    assert {row["step"] for row in rows(run, "val")} == {0, 3, 6, 8}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val"]["sampled_after"] > summary["val"]["sampled_before"] + 0.3, summary["val"]
    assert summary["rollouts"] == summary["rollouts_trained"] == 8 * 64 and summary["rollouts_dropped"] == {}
    assert summary["swaps"] == summary["swaps_proved"] >= 8 and summary["unproved_tokens_trained"] == 0
    assert all(row["update.max_logprob_diff"] < 1e-4 for row in trained)
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    for row, line in zip(trained, lines, strict=True):
        kinds = 1 if row["reward"] in (0, 1) else 2  # reward 0 or 1, less the baseline
        assert len(line["advantages"]) == 64 and len({*line["advantages"].values()}) == kinds, row

    again = json.loads(lightning_ray(tmp_path, "replay", "runs/reinforce", "--step", "6", "--json"))
    assert again["agrees"] and again["trained_otherwise"] == {}
    doctor = json.loads(lightning_ray(tmp_path, "doctor", "runs/reinforce", "--json"))
    assert doctor["contradictions"] == [] and doctor["reasons"]["trained"]["rollouts"] == 8 * 64


def test_best_of_n_of_the_page_accounts_for_what_it_did_not_choose(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    script = blocks("algorithms.md")[1].replace(
        "algorithm=reinforce",
        'algorithm=BestOfN(model=sys.argv[-1], steps=2, good=0.0, ranks=1, loss="gpg", learning_rate=1e-3)',
    )
    (tmp_path / "best.py").write_text(script.replace(", val_dataset=TASKS[:12]", "").replace("    print(", "    str("))
    script = (tmp_path / "best.py").read_text()
    (tmp_path / "best.py").write_text(script[: script.rindex("    str(")])
    lightning_ray(
        tmp_path, "train", "best.py", "--set", "algorithm.tasks_per_step=4", "--set", "algorithm.group_size=3",
        "--set", "algorithm.engine.max_model_len=64", "--set", "algorithm.engine.kv_cache_memory_mb=16", "--", "model",
    )  # fmt: skip
    run = tmp_path / "runs" / "reinforce"
    assert [(row["rollouts_trained"], row["dropped.not_chosen"]) for row in rows(run)] == [(4, 8), (4, 8)]
    config = json.loads((run / "config.json").read_text())["algorithm"]
    assert config["name"] == "BestOfN" and config["tasks_per_step"] == 4
    doctor = json.loads(lightning_ray(tmp_path, "doctor", "runs/reinforce", "--json"))
    assert doctor["contradictions"] == [] and doctor["reasons"]["not_chosen"]["rollouts"] == 16
    assert "not_chosen" in doctor["advice"]
    again = json.loads(lightning_ray(tmp_path, "replay", "runs/reinforce", "--step", "1", "--json"))
    assert again["agrees"] and again["trained_otherwise"] == {}
