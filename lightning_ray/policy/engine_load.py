"""How busy the engine is: running and waiting requests and the share of its cache in use, as of its last step; and
whether it makes steps at all.
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
        self._stepped = self._free = time.monotonic()

    def note(self, stats: Any) -> None:
        """Take over vLLM's SchedulerStats, which each step has."""
        self.running = stats.num_running_reqs
        self.waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        if self.running or not self.waiting:  # else it goes round and round without getting to anything
            self._stepped = time.monotonic()
        self.cache_use = stats.kv_cache_usage

    def stalled(self, at_work: bool) -> float:
        """Seconds that it has made no step though there was work whenever this was asked, as ``at_work`` tells now."""
        now = time.monotonic()
        if not at_work:
            self._free = now
        return now - max(self._stepped, self._free)

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
                    load.note(scheduler_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger
