"""The learning rate over the optimizer steps."""

from __future__ import annotations

import math

from lightning_ray.policy.settings import OptimizerSettings


def rate_share(settings: OptimizerSettings, step: int) -> float:
    """The rate of optimizer step ``step`` (0 is the first) as a share of ``learning_rate``.

    It rises linearly from 0 over ``warmup_steps``, then stays, or falls linearly or as half a cosine (Loshchilov and
    Hutter, 2017, "SGDR", without restarts) to ``end_learning_rate``, and stays there.
    """
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    assert settings.schedule_steps is not None
    falling = max(settings.schedule_steps - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps) / falling, 1.0)
    left = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    end = settings.end_learning_rate / settings.learning_rate
    return end + (1 - end) * left
