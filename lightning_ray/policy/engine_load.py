"""How busy the engine is: running and waiting requests and the share of its cache in use, as of its last step; and when
it last got on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class EngineLoad:
    """The engine's last figures."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self.cache_use = 0.0
        self.got_on = time.monotonic()
        """When a step last had outputs, or requests at work, or none to work on."""

    def note(self, stats: Any, outputs: bool = False) -> None:
        """Take over vLLM's SchedulerStats, which each step has; ``outputs`` tells whether it had some."""
        self.running = stats.num_running_reqs
        self.waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        self.cache_use = stats.kv_cache_usage
        if outputs or self.running or not self.waiting:  # else it goes round and round without getting to anything
            self.got_on = time.monotonic()

    def as_dict(self) -> dict[str, Any]:
        """For the status."""
        return {"running": self.running, "waiting": self.waiting, "kv_cache_use": round(self.cache_use, 4)}

    def logger(self) -> Callable[..., Any]:
        """What vLLM takes as a factory of stat loggers."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        load = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0):
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    load.note(scheduler_stats, iteration_stats is not None)

            def log_engine_initialized(self) -> None:
                pass

        return Logger
