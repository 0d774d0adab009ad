"""The attempt at work in this task or thread, and the spans it has recorded.

A context variable holds the attempt, so that many rollouts run at once in one process and no span lands in another's.
Spans come in two ways: recorded here (rewards, model calls), or through OpenTelemetry (``tracing.provider``).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

from lightning_ray.semconv import UNFINISHED
from lightning_ray.span import Span
from lightning_ray.traces.ids import root_id_of, trace_id_of

Row = dict[str, Any]
"""A span as a mapping with the fields of ``span.Span``. Its ``sequence_id`` is 0: the store numbers it on arrival."""


class Begun(Protocol):
    """A span that has begun: cheap to look at, and a row when asked."""

    @property
    def name(self) -> str: ...

    @property
    def attributes(self) -> Mapping[str, Any]: ...

    @property
    def parent_id(self) -> str | None: ...

    def row(self) -> Row:
        """The span as it is now."""


live: WeakValueDictionary[int, AttemptTrace] = WeakValueDictionary()
"""Attempts by trace id, and by the id of each of their open spans."""


@dataclass(eq=False)
class AttemptTrace:
    """The spans of one attempt, in the order in which they ended.

    All belong to one trace, whose root is the attempt itself: a span without a parent in the agent has ``parent_id``
    None. Any thread may record.
    """

    rollout_id: str
    attempt_id: str
    trace_id: str = ""
    """By default what rollout and attempt are called makes it (``traces.ids``); so the root's."""
    spans: list[Row] = field(default_factory=list)
    """What has ended so far."""
    root_id: str = field(default="", repr=False)
    """What OpenTelemetry is told to be the parent of the attempt's outermost spans."""
    ended: bool = False
    listener: Callable[[Row], None] | None = field(default=None, repr=False)
    """Told each span as it is recorded, in the thread that records it."""

    def __post_init__(self) -> None:
        self.trace_id = self.trace_id or trace_id_of(self.rollout_id, self.attempt_id)
        self.root_id = self.root_id or root_id_of(self.rollout_id, self.attempt_id)
        self._lock = threading.Lock()
        self._open: dict[str, Begun] = {}
        self._begun: set[str] = set()
        self._taken = 0
        live[int(self.trace_id, 16)] = self

    def add(
        self,
        name: str,
        attributes: Mapping[str, Any],
        status: str = "OK",
        description: str | None = None,
        at: float | None = None,
        until: float | None = None,
    ) -> Row:
        """Record what happens now, or ``at`` a time (``until`` another), in Unix seconds."""
        span = OpenSpan(self, name, attributes, at)
        return self.record(span.row(span.start_time if until is None else until, status, description))

    def begin(self, name: str, attributes: Mapping[str, Any]) -> OpenSpan:
        """Start a span that its ``end`` records. It does not become the parent of others."""
        span = OpenSpan(self, name, attributes)
        self.opened(span.span_id, span)
        return span

    def opened(self, span_id: str, span: Begun) -> None:
        """A span has begun."""
        self._begun.add(span_id)
        self._open[span_id] = span

    def close(self, span_id: str, row: Callable[[], Row]) -> None:
        """A span that was ``opened`` has ended as ``row``; recorded unless it, or the attempt, had ended before."""
        if self._open.pop(span_id, None) is not None:
            self._append(row())

    def record(self, row: Row) -> Row:
        """Append a span that has ended. Raises RuntimeError if the attempt has."""
        if not self._append(row):
            raise RuntimeError(
                f"attempt {self.attempt_id} of rollout {self.rollout_id} has ended: {row['name']!r} comes too late"
            )
        return row

    def _append(self, row: Row) -> bool:
        with self._lock:
            if self.ended:
                return False
            self._begun.add(row["span_id"])
            self.spans.append(row)
        if self.listener is not None:
            self.listener(row)
        return True

    def knows(self, span_id: str) -> bool:
        """Whether a span of this attempt has that id."""
        return span_id in self._begun

    def open_span(self, span_id: str | None) -> Begun | None:
        """The span of that id, if it has begun and not ended."""
        return self._open.get(span_id) if span_id is not None else None

    def take(self) -> list[Row]:
        """The spans that ended since the last call."""
        if self._taken == len(self.spans):
            return []
        with self._lock:
            first, self._taken = self._taken, len(self.spans)
            return self.spans[first:]

    def as_spans(self) -> list[Span]:
        """What has ended so far, numbered from 1."""
        return [Span.model_validate({**row, "sequence_id": index}) for index, row in enumerate(self.spans, 1)]

    def finish(self) -> None:
        """End the attempt: what is still open is recorded as it is, with a note, and nothing after it."""
        for span_id, span in list(self._open.items()):
            row = span.row()
            noted = {**row, "end_time": time.time(), "attributes": {**row["attributes"], UNFINISHED: True}}
            self.close(span_id, lambda noted=noted: noted)  # type: ignore[misc]
        with self._lock:
            self.ended = True

    def parent_here(self) -> str | None:
        """Id of the attempt's span that is current in this task or thread."""
        from opentelemetry.trace import get_current_span

        span_id = f"{get_current_span().get_span_context().span_id:016x}"
        return span_id if span_id in self._begun else None


class OpenSpan:
    """A span of an attempt between its beginning and its end."""

    def __init__(
        self, trace: AttemptTrace, name: str, attributes: Mapping[str, Any], start_time: float | None = None
    ) -> None:
        self.trace = trace
        self.name = name
        self.attributes = dict(attributes)
        self.span_id = secrets.token_hex(8)
        self.parent_id = trace.parent_here()
        self.start_time = time.time() if start_time is None else start_time

    @property
    def is_open(self) -> bool:
        """Whether it has not ended, nor its attempt."""
        return self.trace.open_span(self.span_id) is not None

    def end(self, status: str = "OK", description: str | None = None, events: Iterable[Row] = ()) -> None:
        """Record it, unless it has ended already."""
        self.trace.close(self.span_id, lambda: {**self.row(time.time(), status, description), "events": list(events)})

    def row(self, end_time: float | None = None, status: str = "UNSET", description: str | None = None) -> Row:
        """The span as it is now."""
        return {
            "rollout_id": self.trace.rollout_id,
            "attempt_id": self.trace.attempt_id,
            "sequence_id": 0,
            "trace_id": self.trace.trace_id,
            "span_id": self.span_id,
            "parent_id": self.parent_id,
            "name": self.name,
            "start_time": self.start_time,
            "end_time": end_time,
            "status": {"status_code": status, "description": description},
            "attributes": self.attributes,
        }


_current: ContextVar[AttemptTrace | None] = ContextVar("lightning_ray_attempt", default=None)


def current_trace() -> AttemptTrace | None:
    """The attempt at work here, if there is one."""
    return _current.get()


def active_trace() -> AttemptTrace:
    """The attempt at work here. Raises RuntimeError outside of one."""
    trace = _current.get()
    if trace is None:
        raise RuntimeError("nothing is being traced here: emit from inside an agent's rollout")
    return trace


@contextmanager
def traced(trace: AttemptTrace) -> Iterator[AttemptTrace]:
    """Everything that begins in this context belongs to ``trace``."""
    from opentelemetry import context as otel

    from lightning_ray.tracing import provider

    provider.install()
    token = _current.set(trace)
    otel_token = otel.attach(provider.root_context(trace))
    try:
        yield trace
    finally:
        otel.detach(otel_token)
        _current.reset(token)


@contextmanager
def carried(trace: AttemptTrace) -> Iterator[None]:
    """The attempt at work here is ``trace``; for a thread that has its own, empty, context."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)
