"""What one captured request is made of, and the spans it becomes.

The edge creates a ``CapturedRequest`` and puts it into ``current_request``; the engine half finds it there and adds
one ``SampledSequence`` for every sequence the engine samples.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_ray.capture.address import Caller
from lightning_ray.semconv import CLIENT_SPAN, MODEL_CALL_NAMES, SUPERSEDED_SPAN
from lightning_ray.traces.ids import trace_id_of

ANSWERED = ("stop", "length", "tool_calls", "end_turn", "tool_use", "max_tokens", "stop_sequence")
"""Finish reasons of sequences that came to their end; the engine's are the first two, the others are upstream APIs'."""


_random = random.Random()
"""Begun from the system's entropy, which takes a call of the system for each number itself."""


def new_id(digits: int) -> str:
    """An id as OpenTelemetry has them: so many hexadecimal digits. No secret."""
    return f"{_random.getrandbits(4 * digits):0{digits}x}"


class Sampled(Protocol):
    """What a span has beside the request: a sequence of the engine's, or the answer of an endpoint that is not ours."""

    weight_versions: list[int]
    """Of its tokens; none if it has no tokens."""
    finish_reason: str | None
    """None if it was broken off."""

    def columns(self) -> dict[str, Any]:
        """The status, the finish reason and, where there are token ids, the token columns."""

    def attributes(self, started: float, ended: float) -> dict[str, Any]:
        """All else, among it usage and times; Unix seconds."""


@dataclass
class SampledSequence:
    """One sequence as the engine sampled it; the three lists have one entry for each sampled token."""

    prompt_ids: list[int]
    sampled_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int | None = None
    """Of the prompt, whose keys and values were there already."""
    queue_seconds: float | None = None
    first_token: float | None = None
    """When its first token came; Unix seconds."""
    restored_tokens: int = 0
    """How far the prompt's own ids had to be replaced by those that were sampled; 0 if they were the same."""

    def end(self, reason: str, count: int) -> None:
        """It ended with its first ``count`` tokens."""
        self.finish_reason = reason
        for values in (self.sampled_ids, self.logprobs, self.weight_versions):
            del values[count:]

    def columns(self) -> dict[str, Any]:
        """Its tokens, and whether it came to its end."""
        return {
            "status": "OK" if self.finish_reason in ANSWERED else "ERROR",
            "prompt_ids": self.prompt_ids,
            "sampled_ids": self.sampled_ids,
            "logprobs": self.logprobs,
            "weight_versions": self.weight_versions,
            "finish_reason": self.finish_reason,
        }

    def attributes(self, started: float, ended: float) -> dict[str, Any]:
        """Usage and times of this sequence."""
        first = None if self.first_token is None else self.first_token - started
        found = {
            "usage": {
                "prompt_tokens": len(self.prompt_ids),
                "completion_tokens": len(self.sampled_ids),
                "cached_tokens": self.cached_tokens,
            },
            "timing": {"queue": self.queue_seconds, "first_token": first, "total": ended - started},
        }
        return {**found, "restored_tokens": self.restored_tokens} if self.restored_tokens else found


@dataclass
class CapturedRequest:
    """Who called, by which wire API, and what the engine made of it."""

    caller: Caller
    api: str
    body: dict[str, Any]
    """As sent, images by reference."""
    model: str | None = None
    """The name of what serves it, where that is known; the client need not say it."""
    continues: bool = False
    """Whether the conversation has an answer of the model's already."""
    digest: str = ""
    retry: int = 0
    place: int = 0
    """Among the attempt's calls that ask the same; a retry has that of the call it supersedes."""
    started: float = field(default_factory=time.time)
    sequences: list[Sampled] = field(default_factory=list)
    """What was sampled by calls of the engine that have ended."""
    running: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Calls of the engine at work, each with what moves its sequences to ``sequences`` and itself out of here."""
    ended: Callable[[], None] | None = None
    """Called when the last of the engine's calls has ended."""
    at_engine: bool = False
    """Whether it has come to the engine."""
    hung_up: bool = False
    """Whether its client went away before the answer was out; the app may answer nobody nevertheless."""
    taken: int = 0
    """Sequences that ``take_spans`` has handed out."""
    span_ids: list[str] = field(default_factory=list)
    trace_id: str = ""
    """The attempt's."""
    parent: str | None = None
    """The client's span that it comes from, if the client says so."""
    sampling_used: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trace_id = self.trace_id or trace_id_of(*self.attempt)

    @property
    def attempt(self) -> tuple[str, str]:
        """Rollout and attempt id."""
        return self.caller.rollout_id, self.caller.attempt_id

    @property
    def complete(self) -> bool:
        """Whether the engine has ended every sequence of this request."""
        return bool(self.sequences) and not self.running

    def engine_ended(self) -> None:
        """One of the engine's calls has ended and its sequences are here.

        One that was broken off is not told: why, the edge knows a moment later.
        """
        whole = all(sequence.finish_reason is not None for sequence in self.sequences)
        if self.complete and whole and self.ended is not None:
            self.ended()

    def settle(self) -> None:
        """Take over what calls that were left in the middle have sampled so far."""
        for take_over in list(self.running.values()):
            take_over()

    def versions(self) -> str | None:
        """The weight versions that sampled: ``"3"``, or ``"3-5"`` if they were swapped meanwhile."""
        found = {version for sequence in self.sequences for version in sequence.weight_versions}
        if not found:
            return None
        low, high = min(found), max(found)
        return str(low) if low == high else f"{low}-{high}"

    def take_spans(self) -> list[dict[str, Any]]:
        """One row of the span schema for each sampled sequence that was not handed out before."""
        first, self.taken = self.taken, len(self.sequences)
        ended = time.time()
        attributes: dict[str, Any] = {"request": self.body, "sampling": self.sampling_used, "digest": self.digest}
        if self.retry:
            attributes["retry"] = self.retry
        if self.hung_up:
            attributes["hung_up"] = True
        if self.parent is not None:
            attributes[CLIENT_SPAN] = self.parent
        rows = [
            {
                **self.row(MODEL_CALL_NAMES[self.api], ended),
                **sequence.columns(),
                "agent": self.caller.agent,
                "model": self.model or self.body.get("model"),
                "attributes": {**attributes, **sequence.attributes(self.started, ended)},
            }
            for sequence in self.sequences[first:]
        ]
        for row in rows:
            if self.hung_up and row["status"] == "OK":
                row["status"] = "ERROR"  # nobody got the answer, so nothing follows from it
        self.span_ids += [row["span_id"] for row in rows]
        return rows

    def superseding(self, span_ids: list[str]) -> list[dict[str, Any]]:
        """Rows that say of earlier spans that this request, a retry, stands in their place."""
        return [
            {
                **self.row(SUPERSEDED_SPAN, time.time()),
                "parent_id": span_id,
                "status": "OK",
                "attributes": {"retry": self.retry, "digest": self.digest},
            }
            for span_id in span_ids
        ]

    def row(self, name: str, ended: float) -> dict[str, Any]:
        """A row of this request's attempt and trace, with a span id of its own."""
        return {
            "rollout_id": self.caller.rollout_id,
            "attempt_id": self.caller.attempt_id,
            "sequence_id": 0,
            "trace_id": self.trace_id,
            "span_id": new_id(16),
            "parent_id": None,
            "name": name,
            "start_time": self.started,
            "end_time": ended,
        }


current_request: ContextVar[CapturedRequest | None] = ContextVar("lightning_ray_request", default=None)
