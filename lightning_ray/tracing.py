"""What is being traced: the attempt at work in this task or thread, and the spans it has emitted.

A context variable holds the attempt, so that many rollouts run at once in one process and no span lands in another's.
Where the spans go is the runner's business.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class AttemptTrace:
    """The spans of one attempt, in order of emission; each is a mapping with the fields of ``types.Span``."""

    rollout_id: str
    attempt_id: str
    trace_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    spans: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, name: str, attributes: dict[str, Any], status: str = "OK", description: str | None = None
    ) -> dict[str, Any]:
        """Record an event that happens now."""
        now = time.time()
        span: dict[str, Any] = {
            "rollout_id": self.rollout_id,
            "attempt_id": self.attempt_id,
            "sequence_id": len(self.spans) + 1,
            "trace_id": self.trace_id,
            "span_id": uuid.uuid4().hex[:16],
            "parent_id": None,
            "name": name,
            "start_time": now,
            "end_time": now,
            "status": {"status_code": status, "description": description},
            "attributes": attributes,
        }
        self.spans.append(span)
        return span


_current: ContextVar[AttemptTrace | None] = ContextVar("lightning_ray_attempt", default=None)


def active_trace() -> AttemptTrace:
    """The attempt at work here. Raises RuntimeError outside of one."""
    trace = _current.get()
    if trace is None:
        raise RuntimeError("nothing is being traced here: emit from inside an agent's rollout")
    return trace


@contextmanager
def traced(trace: AttemptTrace) -> Iterator[AttemptTrace]:
    """Everything emitted in this context belongs to ``trace``."""
    token = _current.set(trace)
    try:
        yield trace
    finally:
        _current.reset(token)
