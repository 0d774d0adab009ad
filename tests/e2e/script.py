"""A training script as a user would write it: ``lightning-ray train tests/e2e/script.py -- AGENT [--empty]``."""

from __future__ import annotations

import sys

import lightning_ray as lr
from tests.e2e.tiny import AGENTS, make_tiny_model

if __name__ == "__main__":
    tasks = [] if "--empty" in sys.argv else [{"question": f"w{i % 12} w{i % 5}"} for i in range(24)]
    algorithm = lr.GRPO(
        model=make_tiny_model,
        steps=12,
        prompts_per_step=8,
        group_size=8,
        learning_rate=5e-3,
        warmup_steps=1,
        validate_every=0,
        checkpoint_every=1,
        rollout_timeout_seconds=30,
        max_attempts=1,
        engine=lr.EngineSettings(max_model_len=64, kv_cache_memory_mb=16),
    )
    lr.Trainer(algorithm=algorithm, n_runners=2, name="tiny").fit(AGENTS[sys.argv[1]], train_dataset=tasks)
