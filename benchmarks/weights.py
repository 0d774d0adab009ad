"""What does a proved weight swap take, with answers being sampled, over what loading the weights takes by itself?

    python -m benchmarks.weights            an 80M model and a 0.6M one, by the object store and by gloo, and a LoRA
                                            adapter of the larger alone (5 minutes)
    python -m benchmarks.weights --quick    without gloo, fewer swaps (3 minutes)

The whole chain is real: Ray, Serve, vLLM, a trainer rank. A swap runs from the call of ``publish`` to the proof. What
loading takes by itself is told by swaps in one chunk, made in turn with those measured: there the replica's engine
loads the same weights from its own memory while nothing is handed out. Figures are medians. The last line of the
output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import Progress

import lightning_ray as lr
from benchmarks.report import show
from benchmarks.store import Goal, bar, circumstances
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.cluster import Cluster
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.policy.transfer import MOST_CHUNKS
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run

GOALS = (Goal("swap_over_apply_ratio", 1.4), Goal("swap_ms_tiny", 60))
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 1024},
    "83m": {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12, "vocab_size": 32_000},
}
"""Qwen3 with tied embeddings: 0.6M and 80M parameters."""
LORA_RANK = 16
IN_FLIGHT = 4
WARM_SWAPS = 3


def make_model(folder: Path, size: str) -> None:
    """A random model of that size, with a tokenizer of plain words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    shape = SIZES[size]
    words = {"<pad>": 0, "<|end|>": 1, **{f"w{index}": index for index in range(2, shape["vocab_size"])}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        **shape,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape["hidden_size"] // 4,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).float().save_pretrained(folder)


@lr.rollout
async def talks(task: Any, llm: lr.LLM) -> float:
    """One long answer."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    asked: Any = {"ignore_eos": True}
    await client.chat.completions.create(
        model=llm.model, messages=[{"role": "user", "content": "w2 w3 w4"}], max_tokens=300, extra_body=asked
    )
    return 1.0


async def swaps(folder: Path, size: str, transfer: Any, count: int, progress: Progress) -> tuple[list[Any], list[Any]]:
    """So many swaps with answers in flight, after a few to get warm; and as many in one chunk where there are more."""
    engine = EngineSettings(max_model_len=512, kv_cache_memory_mb=64, transfer=transfer)
    lora = {"rank": LORA_RANK if transfer == "adapter" else 0}
    settings = GRPO(model=lambda made: make_model(made, size), ranks=1, engine=engine, lora=lora)
    run_folder = RunFolder(folder / f"{size}-{transfer}")
    run_folder.create(resume=False)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=IN_FLIGHT)
    run = Run(run_folder, Reporter(Console(quiet=True)), Cluster(), talks, {"train": [0]}, runners, False)
    chunkings = (MOST_CHUNKS, 1) if (size, transfer) == ("83m", "object") else (MOST_CHUNKS,)
    task = progress.add_task(f"{size} model by {transfer}", total=(count + WARM_SWAPS) * len(chunkings))
    try:
        await run.start(settings)
        load = asyncio.create_task(keep_busy(run))
        found: dict[int, list[Any]] = {chunks: [] for chunks in (MOST_CHUNKS, 1)}
        for _ in range(count + WARM_SWAPS):
            for chunks in chunkings:
                await asyncio.sleep(0.3)
                run.policy.swapper.transfer.most_chunks = chunks
                await run.publish(run.state.version + 1)
                found[chunks].append(run.policy.swapper.last)
                progress.advance(task)
                if load.done():
                    load.result()
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        return found[MOST_CHUNKS][WARM_SWAPS:], found[1][WARM_SWAPS:]
    finally:
        await run.close()


async def keep_busy(run: Run) -> None:
    """Answers in flight, for ever."""
    while True:
        await run.play_groups([0] * (2 * IN_FLIGHT), 1, sampled=True)


def figures_of(size: str, transfer: str, found: list[Any], alone: list[Any]) -> dict[str, Any]:
    """Medians of one model's swaps, ``alone`` being those in one chunk."""
    label = f"{size}_{transfer}"
    whole = median(swap.seconds for swap in found) * 1e3
    figures: dict[str, Any] = {f"swap_ms_{label}": round(whole, 1)}
    if found[0].bytes is not None:
        figures[f"mb_{label}"] = round(found[0].bytes / 1e6, 2)
    if alone:
        apply = median(swap.phases["apply"] for swap in alone) * 1e3
        figures[f"apply_ms_{label}_one_chunk"] = round(apply, 1)
        figures[f"swap_ms_{label}_one_chunk"] = round(median(swap.seconds for swap in alone) * 1e3, 1)
        figures["swap_over_apply_ratio"] = round(whole / apply, 2)
        figures[f"gb_per_s_{label}"] = round(found[0].bytes / 1e6 / whole, 2)
    for name in found[0].phases:
        figures[f"{name}_ms_{label}"] = round(median(swap.phases[name] for swap in found) * 1e3, 1)
    return figures


async def measure(folder: Path, quick: bool, progress: Progress) -> dict[str, Any]:
    """All figures."""
    count = 8 if quick else 20
    figures: dict[str, Any] = {}
    for transfer in ("object", "adapter") if quick else ("object", "adapter", "gloo"):
        for size in ("83m",) if transfer == "adapter" else SIZES:
            figures |= figures_of(size, transfer, *await swaps(folder, size, transfer, count, progress))
    ratio = figures.pop("swap_over_apply_ratio")
    return {"swap_over_apply_ratio": ratio, "swap_ms_tiny": figures["swap_ms_tiny_object"], "swaps": count, **figures}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="without gloo, fewer swaps")
    quick = arguments.parse_args().quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), bar() as progress:
        figures = asyncio.run(measure(Path(folder), quick, progress))
    figures |= circumstances(quick)
    show("weight swaps", GOALS, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
