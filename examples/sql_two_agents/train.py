"""Train a writer of SQL and its checker, two policies that begin as the same tiny model.

    lightning-ray train examples/sql_two_agents                                                     both
    lightning-ray train examples/sql_two_agents --set algorithm.policies.checker.trainable=false    the writer alone
    lightning-ray train examples/sql_two_agents --set algorithm.policies.writer.trainable=false     the checker alone

A policy that is not trained is served as it is. Data, model and warm start are those of examples/sql.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning_ray as lr
from examples.sql.task import make_tasks
from examples.sql_two_agents.agent import write_and_check
from lightning_ray import progress


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=0, help="of databases, model and training")
    seed = arguments.parse_args().seed
    train, val, test = make_tasks(seed)

    def make_model(folder: Path) -> None:
        from examples.sql.warm_start import warm_start

        warm_start(
            folder, seed, on_progress=lambda step, steps, loss: progress.advance(step, steps, f"loss {loss:.2f}")
        )

    algorithm = lr.GRPO(
        policies={
            "writer": lr.Policy(model=make_model, agents="write|rewrite"),
            "checker": lr.Policy(model=make_model, agents="check"),
        },
        steps=20,
        group_size=8,
        prompts_per_step=16,
        learning_rate=6e-4,
        minibatch_rollouts=64,
        ranks=1,
        validate_every=5,
        rollout_timeout_seconds=60,
        checkpoint_every=5,
        seed=seed,
        engine=lr.EngineSettings(max_model_len=256, max_num_seqs=128, kv_cache_memory_mb=64),
    )
    lr.Trainer(algorithm=algorithm, n_runners=1, name="sql-two-agents").fit(
        write_and_check, train_dataset=train, val_dataset=val, test_dataset=test
    )


if __name__ == "__main__":
    main()
