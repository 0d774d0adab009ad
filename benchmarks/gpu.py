"""What one GPU does: updates of random models from 0.6 to 8 billion parameters in bfloat16, made on the spot, and the
whole loop with the smallest.

    python -m benchmarks.gpu                  all sizes that fit, and every way of the weights
    python -m benchmarks.gpu --quick          the smallest size, and the usual way
    python -m benchmarks.gpu --only updates   without the loop; or --only loop

Of each size: padded tokens per second of an update, its share of the GPU's peak, peak memory, and how far bfloat16
logprobs are from float32 ones of the same weights. Operations are 6 a parameter and token, and 12 x layers x width x
length a token for attention (PaLM, appendix B); recomputed activations do not count. What does not fit whole is
trained by LoRA, where weights need no gradients: 4 a parameter. The loop is Ray, Serve, vLLM and a trainer rank that
share the GPU: tokens sampled per second, milliseconds of a proved swap with answers being sampled, and how far the
engine's logprobs are from the trainer's. Each size and way runs in a process of its own. The last line of the output
is one JSON object. Without CUDA it says so and ends with code 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_loop import CASES, FIGURES, add_tokenizer
from benchmarks.gpu_loop import measure as measure_loop


class Size(NamedTuple):
    """A Qwen3 by its published shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool


SIZES = {
    "0.6b": Size(1024, 3072, 28, 16, True),
    "1.7b": Size(2048, 6144, 28, 16, True),
    "4b": Size(2560, 9728, 36, 32, True),
    "8b": Size(4096, 12288, 36, 32, False),
}
VOCABULARY = 151_936
BYTES_PER_PARAMETER = 18
"""Weights, gradient and two moments of AdamW in float32, and the bfloat16 copy."""
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 operations per second, from the makers' data sheets."""
ROWS, LENGTH = 64, 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="the smallest size, and the usual way of the weights")
    arguments.add_argument("--only", choices=("updates", "loop"))
    given = arguments.parse_args()
    quick = given.quick
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu needs a CUDA GPU and a CUDA build of PyTorch; here is "
            f"torch {torch.__version__} and no GPU. On a CPU: python -m benchmarks.training"
        )
    device = torch.cuda.get_device_properties(0)
    figures: dict[str, Any] = {"gpu": device.name, "memory_gib": round(device.total_memory / 2**30), "quick": quick}
    for name in [] if given.only == "loop" else list(SIZES)[: 1 if quick else None]:
        lora = parameters(SIZES[name]) * BYTES_PER_PARAMETER > 0.8 * device.total_memory
        figures |= apart(measure, name, lora)
    if given.only != "updates":
        figures |= loop_figures(quick)
    show(figures)
    print(json.dumps(figures))


def apart(work: Any, *given: Any) -> Any:
    """Call in a process of its own, so that the GPU's memory is free afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *given).result()


def loop_figures(quick: bool) -> dict[str, Any]:
    """Figures of the loop, for each way of the weights."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lr-gpu-") as folder:
        model = Path(folder) / "model"
        apart(write_served, model)
        for case in CASES[: 1 if quick else None]:
            figures |= apart(measure_loop, case, model, Path(folder))
    return figures


def write_served(folder: Path) -> None:
    """The smallest size with a tokenizer of words."""
    write_model(folder, SIZES["0.6b"])
    add_tokenizer(folder, VOCABULARY)


def parameters(size: Size) -> int:
    """Weights of a size, embeddings included."""
    attention = size.hidden * 128 * (2 * size.heads + 2 * 8)
    layer = attention + 3 * size.hidden * size.intermediate
    return size.layers * layer + VOCABULARY * size.hidden * (1 if size.tied else 2)


def measure(name: str, lora: bool) -> dict[str, Any]:
    """Figures of one size."""
    from lightning_ray.policy.parts import LoraSettings
    from lightning_ray.policy.settings import UpdateSettings
    from lightning_ray.policy.update import PolicyUpdater

    size = SIZES[name]
    with tempfile.TemporaryDirectory(prefix="lr-gpu-") as folder:
        write_model(Path(folder), size)
        settings = UpdateSettings(
            model_path=folder,
            device="cuda",
            dtype="bfloat16",
            micro_batch_tokens=8192,
            learning_rate=1e-6,
            lora=LoraSettings(rank=32 if lora else 0),
        )
        updater = PolicyUpdater(settings)
        table = make_batch()
        sequences = table["token_ids"].to_pylist()[:4]
        difference = bfloat16_difference(Path(folder), updater.logprobs(sequences), sequences)
        torch.cuda.reset_peak_memory_stats()
        updater.update(table)
        seconds = median(timed(lambda: updater.update(table)) for _ in range(3))
    tokens = ROWS * LENGTH
    per_parameter = 4 if lora else 6
    operations = tokens * (
        per_parameter * parameters(size) + 2 * per_parameter * size.layers * size.heads * 128 * LENGTH
    )
    peak = next((value for gpu, value in PEAKS.items() if gpu in torch.cuda.get_device_name()), None)
    return {
        f"lora_{name}": lora,
        f"update_tokens_per_s_{name}": round(tokens / seconds),
        f"share_of_peak_{name}": round(operations / seconds / peak, 3) if peak else None,
        f"peak_memory_gib_{name}": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        f"bfloat16_logprob_diff_max_{name}": difference[0],
        f"bfloat16_logprob_diff_mean_{name}": difference[1],
    }


def write_model(folder: Path, size: Size) -> None:
    """Random weights in bfloat16, made on the GPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=size.tied,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def make_batch() -> pa.Table:
    """One row a rollout; the second half of it was sampled."""
    draw = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= LENGTH // 2
    return pa.table(
        {
            "rollout_id": [f"r{row}" for row in range(ROWS)],
            "group_id": [f"g{row // 8}" for row in range(ROWS)],
            "reward": pa.array(draw.random(ROWS), pa.float32()),
            "token_ids": [draw.integers(0, VOCABULARY, LENGTH).astype(np.int32) for _ in range(ROWS)],
            "mask": [mask.astype(np.int8)] * ROWS,
            "logprobs": [np.where(mask, -np.log(VOCABULARY), 0).astype(np.float32)] * ROWS,
        }
    )


def bfloat16_difference(folder: Path, ours: list[np.ndarray], sequences: list[list[int]]) -> tuple[float, float]:
    """The largest and the mean difference of logprobs to those of the same weights computed in float32, in nats."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cuda")
    gaps = []
    with torch.no_grad():
        for row, sequence in zip(ours, sequences, strict=True):
            ids = torch.tensor([sequence], device="cuda")
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            gaps.append(np.abs(row - scores.cpu().numpy()))
    every = np.concatenate(gaps)
    return float(every.max()), float(every.mean())


def timed(run: Any) -> float:
    """Seconds of a call, all kernels done."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def show(figures: dict[str, Any]) -> None:
    """One line a size."""
    columns = ("lora", "update_tokens_per_s", "share_of_peak", "peak_memory_gib", "bfloat16_logprob_diff_max")
    table = Table(title=f"updates on {figures['gpu']}, {figures['memory_gib']} GiB")
    for column in ("parameters", *columns):
        table.add_column(column, justify="right")
    for name in SIZES:
        if f"{columns[0]}_{name}" in figures:
            table.add_row(name, *(str(figures[f"{column}_{name}"]) for column in columns))
    loop = Table(title="the loop with 0.6 billion parameters, by the way of the weights")
    for column in ("way", *FIGURES):
        loop.add_column(column, justify="right")
    for case in CASES:
        if f"{FIGURES[0]}_{case.label}" in figures:
            loop.add_row(case.label, *(f"{figures[f'{name}_{case.label}']:.4g}" for name in FIGURES))
    for each in (table, loop):
        if each.row_count:
            Console(width=140).print(each)


if __name__ == "__main__":
    main()
