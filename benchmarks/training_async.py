"""Steps a second with and without overlap of playing and training, on the whole chain; and whether it stayed exact.

The agent's durations are log-normal with a 95th percentile of five times the median (a tool that takes its time), its
calls go to the engine that all share. Both runs play the same tasks, with the same durations of the tool and as many
rollouts at once as a step has, and differ in ``max_staleness`` alone. The weights move: the learning rate is high
enough for the reward to rise.

Beside these, unless it is to be quick, a pair of runs whose agent waits for nothing but the engine, for as many tokens
as are log-normal in the same way, with a model of 8 million parameters: playing and training want the same cores all
the time.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from openai import AsyncOpenAI
from rich.console import Console

import lightning_ray as lr
from benchmarks.training_update import SIZES, write_model
from lightning_ray.agent import LitAgent
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run
from tests.e2e.tiny import WORDS, make_tiny_model

MEDIAN_SECONDS = 0.5
MEDIAN_TOKENS, MOST_TOKENS = 24, 200
SIGMA = math.log(5) / 1.645
"""Of the logarithm: the 95th percentile is five times the median."""
MAX_STALENESS = 3
GROUP, GROUPS = 4, 4
"""Rollouts of a group, and groups of a step."""
WARM_UP = 2
"""Steps that are not timed."""
TASKS = [{"question": f"w{index % 12} w{index * 5 % 12}"} for index in range(48)]


@lr.rollout
async def waits(task: dict[str, Any], llm: lr.LLM, rollout: lr.Rollout) -> float:
    """Two model turns with a slow tool between them; the reward is the share of even words."""
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
            await asyncio.sleep(MEDIAN_SECONDS * drawn(rollout))
    return share_of_even_words(said)


@lr.rollout
async def writes(task: dict[str, Any], llm: lr.LLM, rollout: lr.Rollout) -> float:
    """One answer of so many tokens; the reward is the share of even words."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    answer = await client.chat.completions.create(
        model=llm.model,
        messages=[{"role": "user", "content": task["question"]}],
        max_tokens=min(MOST_TOKENS, max(1, round(MEDIAN_TOKENS * drawn(rollout)))),
        extra_body={"ignore_eos": True},
    )
    return share_of_even_words((answer.choices[0].message.content or "").split())


def drawn(rollout: lr.Rollout) -> float:
    """Log-normal, of median 1; the same for a rollout's place in every run."""
    place = (rollout.metadata or {})["seed"]
    return math.exp(SIGMA * np.random.default_rng(place).standard_normal())


def share_of_even_words(said: list[str]) -> float:
    return sum(word in WORDS[::2] for word in said) / max(1, len(said))


def make_larger_model(folder: Path) -> None:
    """The tiny model's tokenizer and a random model of 8 million parameters."""
    make_tiny_model(folder)
    write_model(folder, SIZES["_8m"])


class Load(NamedTuple):
    """Who plays, and whose weights are trained."""

    agent: LitAgent[Any]
    make_model: Callable[[Path], None]


WAITING = Load(waits, make_tiny_model)
WRITING = Load(writes, make_larger_model)


async def one_run(folder: Path, load: Load, steps: int, max_staleness: int, timed: int) -> dict[str, Any]:
    """The summary of a run, with ``steps_per_s`` from the end of its second step (the first warm the trainer up) to
    that of step ``timed``, and its ``rows`` of metrics.jsonl.
    """
    settings = GRPO(
        model=load.make_model,
        ranks=1,
        group_size=GROUP,
        prompts_per_step=GROUPS,
        steps=steps,
        learning_rate=1e-3,
        max_staleness=max_staleness,
        reproducible=True,
        checkpoint_every=steps,
        engine=EngineSettings(max_model_len=256, kv_cache_memory_mb=32),
    )
    run_folder = RunFolder(folder)
    run_folder.create(resume=False)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=GROUP * GROUPS)
    run = Run(run_folder, Reporter(Console(quiet=True)), Cluster(), load.agent, {"train": TASKS}, runners, False)
    learning = asyncio.create_task(TrainingLoop(settings, run).learn())
    try:
        began = await reached(run, learning, WARM_UP)
        ended = await reached(run, learning, timed)
        await learning
    finally:
        learning.cancel()
        await run.close()
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    rows = [row for row in run_folder.metrics() if row["kind"] == "train"]
    return {**summary, "rows": rows, "steps_per_s": (timed - WARM_UP) / (ended - began)}


async def reached(run: Run, learning: asyncio.Task[None], step: int) -> float:
    """When so many steps were done."""
    while run.state.step < step and not learning.done():
        await asyncio.sleep(0.01)
    if learning.done():
        learning.result()
    return time.perf_counter()


def measure(steps: int, quick: bool) -> dict[str, Any]:
    """The runs, one after the other; a quick measurement has only two, and compares the first half of their steps."""
    timed = steps // 2 if quick else steps
    chosen = {"sync": (WAITING, timed, 0, timed), "async": (WAITING, steps, MAX_STALENESS, timed)}
    if not quick:
        chosen["sync_engine_bound"] = (WRITING, steps, 0, timed)
        chosen["async_engine_bound"] = (WRITING, steps, MAX_STALENESS, timed)
    with tempfile.TemporaryDirectory(prefix="lr-async-") as folder:
        runs = {name: asyncio.run(one_run(Path(folder) / name, *how)) for name, how in chosen.items()}
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        if name.startswith("async"):
            base = runs["sync_engine_bound" if name.endswith("engine_bound") else "sync"]
            figures[f"async_speedup{name.removeprefix('async')}"] = round(run["steps_per_s"] / base["steps_per_s"], 2)
    figures["max_logprob_diff"] = max(run["max_logprob_diff"] for run in runs.values())
    for name in ("unproved_tokens_trained", "stale_tokens_beyond_bound"):
        figures[name] = sum(run[name] for run in runs.values())
    figures |= {"async_steps": steps, "async_max_staleness": MAX_STALENESS, "rollouts_at_once": GROUP * GROUPS}
    for name, run in runs.items():
        figures[f"steps_per_s_{name}"] = round(run["steps_per_s"], 3)
        figures[f"swaps_{name}"] = run["swaps_proved"]
        figures[f"swap_ms_median_{name}"] = run["swap_ms_median"]
        figures[f"update_share_{name}"] = run["time_shares"]["update"]
        figures[f"waiting_share_{name}"] = run["time_shares"]["rollouts"]
        figures[f"staleness_mean_{name}"] = staleness_mean(run["rows"])
    return figures


def staleness_mean(rows: list[dict[str, Any]]) -> float:
    """Versions, over the steps that trained."""
    found = [row["update.staleness_mean"] for row in rows if "update.staleness_mean" in row]
    return round(sum(found) / len(found), 2)
