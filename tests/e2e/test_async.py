"""Asynchronous training on the whole chain: staleness bounded, swaps amid answers, ranks killed, resumed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run import Run
from lightning_ray.run_folder import RunFolder
from tests.e2e.tiny import make_tiny_model, two_turns

pytestmark = pytest.mark.e2e
TASKS = [{"question": f"w{i} w{i + 1}", "length": 6 + i % 12} for i in range(10)]


def make_run(path: Path, resume: bool = False) -> Run:
    folder = RunFolder(path)
    folder.create(resume)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=64)
    return Run(folder, Reporter(Console(quiet=True)), Cluster(), two_turns, {"train": TASKS}, runners, resume)


def settings(steps: int, **more: Any) -> GRPO:
    engine = EngineSettings(max_model_len=128, kv_cache_memory_mb=16)
    values = {"ranks": 1, "learning_rate": 1e-3, "warmup_steps": 0, "group_size": 4, "prompts_per_step": 3}
    return GRPO(model=make_tiny_model, steps=steps, engine=engine, **{**values, **more})


async def test_stale_tokens_stay_within_the_bound_and_a_killed_rank_is_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "async")
    loop = TrainingLoop(settings(8, max_staleness=2, checkpoint_every=3), run)
    learning = asyncio.create_task(loop.learn())
    try:
        while run.state.step < 4:
            await asyncio.sleep(0.05)
            if learning.done():
                await learning
        [pid] = await run.cluster.trainers.call("pid", timeout=30.0)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(learning, 150)
    finally:
        learning.cancel()
        await run.close()
    summary = json.loads((tmp_path / "async" / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["trainer_restarts"] == 1
    assert summary["unproved_tokens_trained"] == summary["stale_tokens_beyond_bound"] == 0
    assert summary["swaps"] == summary["swaps_proved"] and summary["max_logprob_diff"] < 1e-4
    rows = [row for row in run.folder.metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(8))
    for row in rows:
        assert sum(share for name, share in row.items() if name.startswith("time.")) == pytest.approx(1)
    assert any("time.restart" in row for row in rows) and rows[-1]["swap_gb_per_s"] > 0
    versions = [row["weight_version"] for row in rows]
    assert versions == sorted(set(versions)), "a version number came twice"


async def test_three_steps_and_three_more_equal_six(tmp_path: Path) -> None:
    async def steps(path: Path, count: int, resume: bool = False) -> list[dict[str, Any]]:
        run = make_run(path, resume)
        chosen = settings(6, reproducible=True, checkpoint_every=3)
        loop = TrainingLoop(chosen, run)
        learning = asyncio.create_task(loop.learn())
        try:
            while not learning.done() and run.state.step < count:
                await asyncio.sleep(0.02)
            if count == 6:
                await learning
        finally:
            learning.cancel()
            await asyncio.gather(learning, return_exceptions=True)
            await run.close()
        return [row for row in run.folder.metrics() if row["kind"] == "train"]

    whole = await steps(tmp_path / "whole", 6)
    await steps(tmp_path / "parts", 4)
    parts = await steps(tmp_path / "parts", 6, resume=True)
    assert [row["step"] for row in parts] == list(range(6))
    for one, other in zip(whole, parts, strict=True):
        assert one["reward"] == other["reward"], one["step"]
        assert one["update.loss"] == pytest.approx(other["update.loss"], abs=1e-6)
        assert one["update.grad_norm"] == pytest.approx(other["update.grad_norm"], rel=1e-4)


async def test_an_interrupted_run_has_pictures_and_goes_on_under_other_settings(tmp_path: Path) -> None:
    """Three asynchronous steps with a checkpoint after each, then three strictly on-policy ones of fewer tasks."""
    path = tmp_path / "run"
    run = make_run(path)
    learning = asyncio.create_task(TrainingLoop(settings(6, max_staleness=2, checkpoint_every=1), run).learn())
    try:
        while not learning.done() and run.folder.latest_checkpoint() != path / "checkpoints" / "step-000003":
            await asyncio.sleep(0.02)
    finally:
        learning.cancel()
        await asyncio.gather(learning, return_exceptions=True)
        await run.close()
    assert (path / "training.png").is_file() and not (path / "summary.json").exists()

    run = make_run(path, resume=True)
    chosen = settings(6, max_staleness=0, prompts_per_step=2, learning_rate=3e-4, schedule="linear")
    try:
        await asyncio.wait_for(TrainingLoop(chosen, run).learn(), 120)
    finally:
        await run.close()
    summary = json.loads((path / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["stale_tokens_beyond_bound"] == summary["unproved_tokens_trained"] == 0
    rows = [row for row in run.folder.metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(6))
    assert {row["update.learning_rate"] for row in rows[:3]} == {1e-3}
    assert [row["update.learning_rate"] for row in rows[3:]] == pytest.approx([1.5e-4, 1e-4, 5e-5])
    assert [row["rollouts"] for row in rows] == [12] * 3 + [8] * 3
    assert [row["update.staleness_max"] for row in rows[3:]] == [0, 0, 0]
    assert all(row["update.ratio_mean"] == pytest.approx(1, abs=1e-4) for row in rows[3:]), "on-policy to the token"
