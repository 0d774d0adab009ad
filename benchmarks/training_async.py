"""Steps a second with and without overlap of playing and training, on the whole chain; and whether it stayed exact.

The agent's durations are log-normal with a 95th percentile of five times the median (a tool that takes its time), its
calls go to the engine that all share. Both runs train the same tasks with the same settings but ``max_staleness``.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from rich.console import Console

import lightning_ray as lr
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run import Run
from lightning_ray.run_folder import RunFolder
from tests.e2e.tiny import WORDS, make_tiny_model

MEDIAN_SECONDS = 1.0
SIGMA = math.log(5) / 1.645
"""Of the logarithm: the 95th percentile is five times the median."""
MAX_STALENESS = 3
TASKS = [{"question": f"w{index % 12} w{index * 5 % 12}"} for index in range(48)]


@lr.rollout
async def waits(task: dict[str, Any], llm: lr.LLM, rollout: lr.Rollout) -> float:
    """Two model turns with a slow tool between them; the reward is the share of even words."""
    chance = np.random.default_rng(zlib.crc32(rollout.rollout_id.encode()))
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    said: list[str] = []
    for turn in range(2):
        answer = await client.chat.completions.create(
            model=llm.model, messages=messages, max_tokens=12, extra_body={"skip_special_tokens": False}
        )
        text = answer.choices[0].message.content or ""
        said += text.split()
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "w1 w2"}]
        if not turn:
            await asyncio.sleep(MEDIAN_SECONDS * math.exp(SIGMA * chance.standard_normal()))
    return sum(word in WORDS[::2] for word in said) / max(1, len(said))


async def one_run(folder: Path, steps: int, max_staleness: int) -> dict[str, Any]:
    """The summary of a run, with ``steps_per_s`` from the end of its second step (the first warm the trainer up)."""
    settings = GRPO(
        model=make_tiny_model,
        ranks=1,
        group_size=4,
        prompts_per_step=4,
        steps=steps,
        max_staleness=max_staleness,
        checkpoint_every=steps,
        engine=EngineSettings(max_model_len=128, kv_cache_memory_mb=16),
    )
    run_folder = RunFolder(folder)
    run_folder.create(resume=False)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=128)
    run = Run(run_folder, Reporter(Console(quiet=True)), Cluster(), waits, {"train": TASKS}, runners, False)
    learning = asyncio.create_task(TrainingLoop(settings, run).learn())
    try:
        began = await reached(run, learning, 2)
        ended = await reached(run, learning, steps)
        await learning
    finally:
        learning.cancel()
        await run.close()
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {**summary, "steps_per_s": (steps - 2) / (ended - began)}


async def reached(run: Run, learning: asyncio.Task[None], step: int) -> float:
    """When so many steps were done."""
    while run.state.step < step and not learning.done():
        await asyncio.sleep(0.01)
    if learning.done():
        learning.result()
    return time.perf_counter()


def measure(steps: int) -> dict[str, Any]:
    """Both runs, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        sync = asyncio.run(one_run(Path(folder) / "sync", steps, 0))
        overlapped = asyncio.run(one_run(Path(folder) / "async", steps, MAX_STALENESS))
    counts = ("unproved_tokens_trained", "stale_tokens_beyond_bound")
    return {
        "async_speedup": round(overlapped["steps_per_s"] / sync["steps_per_s"], 2),
        "max_logprob_diff": max(sync["max_logprob_diff"], overlapped["max_logprob_diff"]),
        **{name: sync[name] + overlapped[name] for name in counts},
        "async_steps": steps,
        "async_max_staleness": MAX_STALENESS,
        "steps_per_s_sync": round(sync["steps_per_s"], 3),
        "steps_per_s_async": round(overlapped["steps_per_s"], 3),
    }
