"""SFT on the whole chain: a policy imitates its own best rollouts, and another one what was exported of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lightning_ray as lr
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.cli import main
from lightning_ray.cluster import Cluster
from lightning_ray.config import RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run
from tests.e2e.tiny import make_tiny_model, one_word

pytestmark = pytest.mark.e2e
TASKS = [{"question": f"w{i % 12} w{i % 7}"} for i in range(48)]
TRAINED, HELD_OUT = TASKS[:32], TASKS[32:]
COMMON: dict[str, Any] = {
    "model": make_tiny_model,
    "learning_rate": 3e-3,
    "epochs": 4,
    "minibatch_rollouts": 16,
    "engine": lr.EngineSettings(max_model_len=64, kv_cache_memory_mb=16),
}


async def fit(algorithm: lr.SFT, path: Path, train: list[dict[str, Any]], resume: bool = False) -> RunFolder:
    """One run to its end."""
    folder = RunFolder(path)
    folder.create(resume)
    (path / "config.json").write_text(json.dumps({"algorithm": {"name": "SFT", **algorithm.settings()}}, default=str))
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=64)
    datasets: dict[str, Any] = {"train": train, "val": HELD_OUT}
    run = Run(folder, Reporter(Console(quiet=True)), Cluster(), one_word, datasets, runners, resume)
    try:
        algorithm.check(run)
        await TrainingLoop(algorithm, run).learn()
    finally:
        await run.close()
    return folder


def summary_of(folder: RunFolder) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder.path / "summary.json").read_text())
    return summary


async def test_a_policy_imitates_its_best_and_another_what_was_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random policy says w7 in one of twenty answers; it is to say nothing else."""
    keep = lr.Keep(min_reward=1.0)
    played = lr.SFT(steps=2, group_size=8, ranks=2, keep=keep, **COMMON)
    await fit(played, tmp_path / "played", TRAINED)
    folder = await fit(played.model_copy(update={"steps": 3}), tmp_path / "played", TRAINED, resume=True)

    summary = summary_of(folder)
    assert summary["steps"] == 3 and summary["swaps"] == summary["swaps_proved"]
    assert summary["rollouts"] == 3 * 32 * 8 == summary["rollouts_trained"] + sum(summary["rollouts_dropped"].values())
    assert summary["unproved_tokens_trained"] == 0 and summary["max_logprob_diff"] < 1e-4
    assert summary["val"]["sampled_before"] < 0.5 and summary["val"]["sampled_after"] > 0.9, summary["val"]
    rows = [row for row in folder.metrics() if row["kind"] == "train"]
    for row in rows:  # rewards are 0 and 1: what is kept is what succeeded, and is all that is trained on
        assert row["rollouts_trained"] == round(row["reward"] * row["rollouts"]) == row["update.trained_rollouts"]
    assert rows[-1]["update.nll"] < rows[0]["update.nll"] and "update.clip_share" not in rows[0]

    assert main(["doctor", str(folder.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["contradictions"] == []
    assert told["reasons"]["below_min_reward"]["rollouts"] == summary["rollouts_dropped"]["below_min_reward"]

    talks = tmp_path / "talks.jsonl"
    assert main(["export", str(folder.path), str(talks), "--min-reward", "1"]) == 0
    assert len(talks.read_text().splitlines()) == summary["rollouts_trained"]

    reading = lr.SFT(steps=2, ranks=1, data=talks, **COMMON)
    folder = await fit(reading, tmp_path / "read", [])
    told = summary_of(folder)
    assert told["val"]["sampled_before"] < 0.5 and told["val"]["sampled_after"] > 0.9, told["val"]
    count = summary["rollouts_trained"]
    assert told["tokens_sampled"] == 0 and told["tokens_trained"] == 2 * 2 * count, "a word and the end of each"
    rows = [row for row in folder.metrics() if row["kind"] == "train"]
    assert [row["rollouts_trained"] for row in rows] == [count, count]
    assert rows[1]["update.nll"] < 0.5 * rows[0]["update.nll"]
    assert told["max_logprob_diff"] < 1e-4, "of the canaries alone"
