"""Asynchronous training on the whole chain: staleness bounded, swaps amid answers, ranks killed, resumed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from opentelemetry.sdk.trace import ReadableSpan
from rich.console import Console

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.cluster import Cluster
from lightning_ray.commands.traces import every_span
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run
from lightning_ray.semconv import ATTEMPT_SPAN, TRAINED_SPAN
from lightning_ray.store.view import open_folder
from lightning_ray.traces.export import TraceExport
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


async def scraped(steps: int, *wanted: str) -> dict[str, dict[str, float]]:
    """Metrics of the Ray that is up, by series and the tags that tell its own apart; once it tells of so many steps and
    of a replica that is proved, and ``wanted`` are among them.
    """
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, dict[str, float]] = defaultdict(dict)
    async with asyncio.timeout(60), httpx.AsyncClient(timeout=10) as client:
        while found["step"].get("") != steps or found["replica_proved"].get("") != 1 or not set(wanted) <= found.keys():
            await asyncio.sleep(0.5)
            for name, tags, value in re.findall(
                r"^ray_lightning_ray_(\w+)\{(.*)\} (\S+)$", (await client.get(address)).text, re.M
            ):
                own = re.findall(r'\b(?:part|status|reason|figure|phase|finish)="([^"]*)"', tags)
                found[name][",".join(own)] = float(value)
    return found


def traces(path: Path) -> list[dict[str, ReadableSpan]]:
    """The trace of each rollout that was trained on, by what its spans are called and by which service they are."""
    view = open_folder(path / "store")
    by_trace: dict[int, dict[str, ReadableSpan]] = defaultdict(dict)
    for span in every_span(TraceExport(path.name), view, list(view.query_rollouts()), {}):
        by_trace[span.context.trace_id][f"{span.resource.attributes['service.name']} {span.name}"] = span
    return [found for found in by_trace.values() if any(name.endswith(TRAINED_SPAN) for name in found)]


async def at_step(step: int, run: Run, learning: asyncio.Task[None]) -> None:
    """Returns once that many steps were made."""
    async with asyncio.timeout(150):
        while run.state.step < step:
            await asyncio.sleep(0.02)
            if learning.done():
                await learning


async def test_stale_tokens_stay_within_the_bound_and_a_rank_and_the_replica_killed_at_once_are_replaced(
    tmp_path: Path,
) -> None:
    """A fresh replica needs the ranks, and ranks are missed only once rollouts end, which needs a replica."""
    run = make_run(tmp_path / "async")
    loop = TrainingLoop(settings(8, max_staleness=2, checkpoint_every=3), run)
    learning = asyncio.create_task(loop.learn())
    try:
        await at_step(1, run, learning)
        [rank] = await run.cluster.trainers.call("pid", timeout=30.0)
        [replica] = await run.cluster.replicas("describe")
        names = {actor.rpartition("-")[0] or actor for actor in ray.util.list_named_actors()}
        await at_step(4, run, learning)
        for pid in (rank, replica["pid"]):
            os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(learning, 150)
        assert {"run/runner-0", "run/trainer", "run/store"} <= names
        metrics = await scraped(8, "queue_length", "call_seconds_count", "replica_proved", "update", "restarts")
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

    assert metrics["step"] == {"": 8.0} and metrics["replica_proved"] == {"": 1.0}
    assert metrics["restarts"]["trainer"] == 1 and metrics["restarts"]["store"] == metrics["restarts"]["runner"] == 0
    assert metrics["staleness_max"][""] <= metrics["staleness_bound"][""] == 2
    assert metrics["call_seconds_count"].keys() == {"queue", "first_token", "total"}
    assert metrics["update"]["entropy"] > 0 and metrics["phase_seconds_total"]["update"] > 0

    trained = traces(tmp_path / "async")
    assert len(trained) >= summary["rollouts_trained"] > 0, "steps after the last checkpoint are made again"
    for found in trained:
        root, last = found[f"async/runner {ATTEMPT_SPAN}"], found[f"async/trainer {TRAINED_SPAN}"]
        client, call = (found[f"async/{by} openai.chat.completion"] for by in ("runner", "policy"))
        decode = found["async/policy lightning_ray.decode"]
        assert root.parent is None and last.parent == client.parent == root.context
        assert call.parent == client.context and decode.parent == call.context
        assert root.start_time < call.start_time < call.end_time < root.end_time < last.end_time


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
