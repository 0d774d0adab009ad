"""The training run that chaos befalls: ``lightning-ray train benchmarks/chaos_train.py -- sql MODEL NOTES [ADDRESS]``.

Asynchronous (``max_staleness=1``), so that rollouts are played all the time, on two replicas, two trainer ranks and two
runners; a checkpoint after every step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning_ray as lr
from benchmarks.chaos_agent import AGENTS
from examples.sql.task import make_tasks
from tests.e2e.tiny import WORDS, make_tiny_model

PAUSE = {"sql": 0.5, "words": 0.3}
"""Seconds that the tool takes."""
RUNNERS = 2
SEED = 101


def main(kind: str, model: str, notes: str, address: str | None = None) -> None:
    own = {"notes": notes, "pause": PAUSE[kind]}
    train, val, test = ([task | own for task in tasks] for tasks in data(kind))
    shape: dict[str, Any] = (
        {"prompts_per_step": 8, "group_size": 8, "learning_rate": 6e-4, "minibatch_rollouts": 32}
        if kind == "sql"
        else {"prompts_per_step": 8, "group_size": 4, "learning_rate": 3e-4, "warmup_steps": 1}
    )
    algorithm = lr.GRPO(
        model=model,
        steps=10_000,
        **shape,
        max_staleness=1,
        validate_every=0,
        checkpoint_every=1,
        rollout_timeout_seconds=60,
        seed=SEED,
        engine=lr.EngineSettings(replicas=2, max_model_len=256, max_num_seqs=64, kv_cache_memory_mb=32),
    )
    lr.Trainer(algorithm=algorithm, n_runners=RUNNERS, concurrency=16, name="chaos", address=address).fit(
        AGENTS[kind], train_dataset=train, val_dataset=val, test_dataset=test
    )


def data(kind: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Train, validation and test tasks, disjoint."""
    if kind == "sql":
        train, val, test = make_tasks(SEED)
        return train, val[:24], test
    tasks = [{"question": f"{one} {other}"} for one in WORDS for other in WORDS]
    return tasks[:96], tasks[96:104], tasks[104:]


def make_model(kind: str, folder: Path) -> None:
    """The model before training, which all runs of a benchmark begin with."""
    if kind == "sql":
        from examples.sql.warm_start import warm_start

        warm_start(folder, SEED)
    else:
        make_tiny_model(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
