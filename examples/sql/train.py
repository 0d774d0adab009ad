"""Teach a tiny model to correct its SQL from the database's error messages.

    lightning-ray train examples/sql                     (or: python -m examples.sql.train)
    lightning-ray train examples/sql -- --no-hint        control: errors do not name the columns

The model is made on the spot, taught the format by demonstrations, and trained by GRPO.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning_ray as lr
from examples.sql.agent import sql_agent
from examples.sql.task import make_tasks
from lightning_ray import progress


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=0, help="of databases, model and training")
    arguments.add_argument("--no-hint", action="store_true", help="answer errors without the columns' names")
    given = arguments.parse_args()
    train, val, test = ([task | {"hint": not given.no_hint} for task in tasks] for tasks in make_tasks(given.seed))

    def make_model(folder: Path) -> None:
        from examples.sql.warm_start import warm_start

        warm_start(
            folder,
            given.seed,
            hint=not given.no_hint,
            on_progress=lambda step, steps, loss: progress.advance(step, steps, f"loss {loss:.2f}"),
        )

    algorithm = lr.GRPO(
        model=make_model,
        steps=20,
        group_size=8,
        prompts_per_step=16,
        learning_rate=6e-4,
        minibatch_rollouts=64,
        validate_every=5,
        rollout_timeout_seconds=60,
        checkpoint_every=1,
        seed=given.seed,
        engine=lr.EngineSettings(max_model_len=256, max_num_seqs=128, kv_cache_memory_mb=64),
    )
    lr.Trainer(algorithm=algorithm, n_runners=2, name="sql").fit(
        sql_agent, train_dataset=train, val_dataset=val, test_dataset=test
    )


if __name__ == "__main__":
    main()
