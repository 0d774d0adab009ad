"""The whole loop on one GPU: Ray, Serve, vLLM and a trainer rank that share it, once for each way of the weights.

Part of ``benchmarks.gpu``. Each case starts a run of its own with a random Qwen3, lets agents sample long answers,
updates, and swaps while answers are being sampled.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from openai import AsyncOpenAI
from rich.console import Console

import lightning_ray as lr
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run
from lightning_ray.trajectories.account import batch_of, settle
from lightning_ray.trajectories.episode import Episode

TOKENS = 256
"""Of an answer."""
GROUP = 8
LOOSE = 10.0
"""A tolerance in nats that everything meets: the differences are what is measured."""


class Case(NamedTuple):
    """How weights travel, and in which numbers both sides compute."""

    transfer: str
    dtype: str
    sleep: bool = False

    @property
    def label(self) -> str:
        return f"{self.transfer}_{self.dtype}{'_sleep' if self.sleep else ''}"


CASES = (
    Case("ipc", "bfloat16"),
    Case("object", "bfloat16"),
    Case("adapter", "bfloat16"),
    Case("ipc", "float32"),
    Case("ipc", "bfloat16", sleep=True),
)

FIGURES = ("start_s", "sampled_tokens_per_s", "update_s", "swap_ms", "canary_diff_max", "logprob_gap_max")


@lr.rollout
async def talks(task: Any, llm: lr.LLM) -> float:
    """One long answer, rewarded at random."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    asked: Any = {"ignore_eos": True}
    messages: Any = [{"role": "user", "content": f"w{task} w{task + 1}"}]
    await client.chat.completions.create(model=llm.model, messages=messages, max_tokens=TOKENS, extra_body=asked)
    return random.random()


def add_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of plain words, one for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<|end|>": 1, **{f"w{index}": index for index in range(2, vocabulary)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def measure(
    case: Case, model: Path, folder: Path, rollouts: int = 64, swaps: int = 3, device: str = "cuda"
) -> dict[str, Any]:
    """Figures of one case, by name; see the module. ``device`` may be ``cpu``, for a small model, without sharing."""
    return {
        f"{name}_{case.label}": value
        for name, value in asyncio.run(_loop(case, model, folder, rollouts, swaps, device)).items()
    }


async def _loop(case: Case, model: Path, folder: Path, rollouts: int, swaps: int, device: str) -> dict[str, Any]:
    engine = EngineSettings(
        device=device,  # type: ignore[arg-type]
        share_gpu=device == "cuda",
        dtype=case.dtype,  # type: ignore[arg-type]
        transfer=case.transfer,  # type: ignore[arg-type]
        sleep=case.sleep,
        max_model_len=2 * TOKENS,
        max_num_seqs=rollouts,
        kv_cache_memory_mb=8192 if device == "cuda" else None,
        logprob_tolerance=LOOSE,
    )
    lora = {"rank": 16 if case.transfer == "adapter" else 0}
    settings = GRPO(model=str(model), ranks=1, engine=engine, lora=lora, learning_rate=1e-5, micro_batch_tokens=16384)
    run_folder = RunFolder(folder / case.label)
    run_folder.create(resume=False)
    runners = RunnerSettings(minimum=2, maximum=2, concurrency=rollouts)
    run = Run(run_folder, Reporter(Console(quiet=True)), Cluster(), talks, {"train": [0]}, runners, False)
    tasks = list(range(2, 2 + rollouts // GROUP))
    began = time.perf_counter()
    try:
        await run.start(settings)
        figures: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 1)}
        await run.play_groups(tasks, GROUP, sampled=True)
        began = time.perf_counter()
        episodes, groups = await run.play_groups(tasks, GROUP, sampled=True)
        figures["sampled_tokens_per_s"] = round(rollouts * TOKENS / (time.perf_counter() - began))
        figures["logprob_gap_max"], figures["logprob_gap_mean"] = await _gap(run, episodes)
        batch = batch_of(settle(episodes, groups).trained, groups)
        found, updates = [], []
        for _ in range(swaps):
            load = asyncio.create_task(run.play_groups(tasks, GROUP, sampled=True)) if not case.sleep else None
            began = time.perf_counter()
            await run.update(batch)
            updates.append(time.perf_counter() - began)
            await run.publish(run.state.version + 1)
            found.append(run.policy.swapper.last)
            if load is not None:
                episodes, _ = await load
        figures["update_s"] = round(median(updates), 3)
        figures["swap_ms"] = round(median(swap.seconds for swap in found) * 1e3, 1)  # type: ignore[union-attr]
        figures["canary_diff_max"] = max(swap.max_logprob_diff for swap in found)  # type: ignore[union-attr]
        episodes, _ = await run.play_groups(tasks, GROUP, sampled=True)
        figures["logprob_gap_after_max"], figures["logprob_gap_after_mean"] = await _gap(run, episodes)
        return figures
    finally:
        await run.close()


async def _gap(run: Run, episodes: list[Episode]) -> tuple[float, float]:
    """The largest and the mean difference between the engine's logprob of a sampled token and the trainer's."""
    rows = [row for episode in episodes[:8] for row in episode.trajectories]
    ours = await run.cluster.trainers.logprobs([[int(token) for token in row.token_ids] for row in rows])
    gaps = [np.abs(row.logprobs[1:] - own)[row.mask[1:] == 1] for row, own in zip(rows, ours, strict=True)]
    every = np.concatenate(gaps)
    return float(every.max()), float(every.mean())
