"""What a run knows of itself: kept with every checkpoint, so that a resume counts on; the summary is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """What a resume must know; counters run over the whole run."""

    step: int = 0
    version: int = 0
    rollouts: int = 0
    rollouts_trained: int = 0
    rollouts_dropped: dict[str, int] = field(default_factory=dict)
    swaps: int = 0
    """Those that came to a verdict: one that a dying trainer rank broke off is begun anew."""
    swaps_proved: int = 0
    swap_ms: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    max_logprob_diff: float = 0.0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    flow: dict[str, Any] = field(default_factory=dict)
    """Groups of rollouts on their way (``algorithms.flow``)."""
    trainer_restarts: int = 0
    stale_tokens_beyond_bound: int = 0
    unproved_tokens_trained: int = 0
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``val.greedy_before`` and so on -> figures."""
