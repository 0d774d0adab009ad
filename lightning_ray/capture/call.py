"""What one captured request is made of, and the span it becomes.

The edge creates a ``CapturedRequest`` and puts it into ``current_request``; the engine half finds it there and adds
one ``SampledSequence`` for every sequence the engine samples.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.semconv import MODEL_CALL_NAMES


@dataclass
class SampledSequence:
    """One sequence as the engine sampled it; the three lists have one entry for each sampled token."""

    prompt_ids: list[int]
    sampled_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class CapturedRequest:
    """Who called, by which wire API, and what the engine made of it."""

    rollout_id: str
    attempt_id: str
    api: str
    body: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    agent: str | None = None
    started: float = field(default_factory=time.time)
    first_token: float | None = None
    sequences: list[SampledSequence] = field(default_factory=list)
    """What was sampled by calls of the engine that have ended."""
    running: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Calls of the engine at work, each with what moves its sequences to ``sequences`` and itself out of here."""
    taken: int = 0
    """Sequences that ``take_spans`` has handed out."""
    trace_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    sampling_used: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the engine has ended every sequence of this request."""
        return bool(self.sequences) and not self.running

    def settle(self) -> None:
        """Take over what calls that were left in the middle have sampled so far."""
        for take_over in list(self.running.values()):
            take_over()

    def take_spans(self) -> list[dict[str, Any]]:
        """One row of the span schema for each sampled sequence that was not handed out before."""
        first, self.taken = self.taken, len(self.sequences)
        ended = time.time()
        attributes = {
            "request": self.body,
            "sampling": self.sampling_used,
            "queue_and_prefill_seconds": None if self.first_token is None else self.first_token - self.started,
        }
        return [
            {
                "rollout_id": self.rollout_id,
                "attempt_id": self.attempt_id,
                "sequence_id": 0,
                "trace_id": self.trace_id,
                "span_id": uuid.uuid4().hex[:16],
                "parent_id": None,
                "name": MODEL_CALL_NAMES[self.api],
                "start_time": self.started,
                "end_time": ended,
                "status": "OK" if sequence.finish_reason in ("stop", "length") else "ERROR",
                "agent": self.agent,
                "model": self.body.get("model"),
                "prompt_ids": sequence.prompt_ids,
                "sampled_ids": sequence.sampled_ids,
                "logprobs": sequence.logprobs,
                "weight_versions": sequence.weight_versions,
                "finish_reason": sequence.finish_reason,
                "attributes": attributes,
            }
            for sequence in self.sequences[first:]
        ]


current_request: ContextVar[CapturedRequest | None] = ContextVar("lightning_ray_request", default=None)
