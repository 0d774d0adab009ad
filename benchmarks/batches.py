"""What it costs to make a training batch, and what joining calls spares the trainer. No Ray, one process, seconds.

    python -m benchmarks.batches [--quick]

1,000 rollouts (200 with ``--quick``) of 8 turns. A turn is 1,000 new prompt tokens and 1,000 sampled ones, and a reward
emitted after it. CPU seconds of the driver, each for all rollouts; then the ratio of tokens that the trainer forwards.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from lightning_ray.emitter.rewards import reward_attributes
from lightning_ray.semconv import AGL_ANNOTATION
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.trajectories.account import Account, batch_of, settle
from lightning_ray.trajectories.episode import Episode, calls_of, read_episodes
from lightning_ray.trajectories.join import join_calls
from lightning_ray.trajectories.settings import BatchSettings
from lightning_ray.types import Rollout

TURNS, NEW, SAMPLED, VOCABULARY = 8, 1000, 1000, 150_000
ROLLOUTS, QUICK, GROUP, PORTION = 1000, 200, 8, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rollouts")
    count = QUICK if parser.parse_args().quick else ROLLOUTS
    figures = measure(count)
    table = Table(title="training batches", show_header=False)
    for key, value in figures.items():
        table.add_row(key, f"{value:,}")
    Console(width=100).print(table)
    print(json.dumps(figures))


def measure(rollouts: int) -> dict[str, float]:
    """The figures; rollouts go through in portions, as their rows fill some gigabytes."""
    seconds: defaultdict[str, float] = defaultdict(float)
    forwarded: Counter[str] = Counter()
    for first in range(0, rollouts, PORTION):
        names = [f"ro-{number}" for number in range(first, first + PORTION)]
        spans = pa.Table.from_batches([conversation(name, seed) for seed, name in enumerate(names, first)])
        calls = calls_of(spans.filter(pc.is_valid(spans["prompt_ids"])))
        with timed(seconds, "join"):
            for made in calls.values():
                join_calls(made)
        with timed(seconds, "read"):
            episodes = read(names, spans)
        groups = {name: f"gr-{number // GROUP}" for number, name in enumerate(names)}
        with timed(seconds, "settle"):
            account = settle(episodes, groups)
        with timed(seconds, "batch"):
            batch_of(account.trained, groups)
        with timed(seconds, "settle_steps"):
            settle(episodes, groups, BatchSettings(credit="step"))
        forwarded["trajectory"] += tokens_of(account)
        forwarded["transition"] += tokens_of(settle(episodes, groups, BatchSettings(level="transition")))
    ratio = forwarded["trajectory"] / forwarded["transition"]
    told = {f"{name}_cpu_seconds": round(value, 2) for name, value in seconds.items()}
    return {"rollouts": rollouts, "multi_turn_tokens_ratio": round(ratio, 3), **told}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU seconds of what is done within."""
    began = time.process_time()
    yield
    seconds[name] += time.process_time() - began


def tokens_of(account: Account) -> int:
    """Tokens that the trainer forwards."""
    return sum(len(row.token_ids) for episode in account.trained for row in episode.trajectories)


def read(names: list[str], spans: pa.Table) -> list[Episode]:
    """The episodes of rollouts that succeeded."""
    rollouts = [Rollout(rollout_id=name, input={}, start_time=0.0, status="succeeded") for name in names]
    return read_episodes(rollouts, spans, dict.fromkeys(names, "at"))


def conversation(name: str, seed: int) -> pa.RecordBatch:
    """The spans of one rollout."""
    random = np.random.default_rng(seed)
    context, rows = np.empty(0, np.int32), []
    for turn in range(TURNS):
        prompt = np.concatenate([context, random.integers(0, VOCABULARY, NEW, np.int32)])
        sampled = random.integers(0, VOCABULARY, SAMPLED, np.int32)
        common = {"rollout_id": name, "attempt_id": "at", "sequence_id": 0, "trace_id": "t", "status": "OK"}
        call = {
            "name": "openai.chat.completion",
            "span_id": f"{name}-call-{turn}",
            "prompt_ids": prompt,
            "sampled_ids": sampled,
            "logprobs": np.zeros(SAMPLED, np.float32),
            "weight_versions": np.zeros(SAMPLED, np.int32),
            "start_time": float(turn),
            "end_time": turn + 0.5,
        }
        reward = {
            "name": AGL_ANNOTATION,
            "span_id": f"{name}-reward-{turn}",
            "attributes": reward_attributes(random.random()),
            "start_time": turn + 0.6,
            "end_time": turn + 0.6,
        }
        rows += [{**common, **call}, {**common, **reward}]
        context = np.concatenate([prompt, sampled])
    return spans_to_batch(rows)


if __name__ == "__main__":
    main()
