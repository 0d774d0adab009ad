"""The tracers of Agent Lightning 0.3, by name and meaning, over attempts that may be many at once.

``get_active_tracer`` tells what emitters speak to here: the tracer set in this context, otherwise the attempt at work.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from lightning_ray.parallel import ParallelWorkerBase
from lightning_ray.span import Attributes, Span, SpanCoreFields, TraceStatus
from lightning_ray.tracing.attempt import AttemptTrace, active_trace, current_trace, traced
from lightning_ray.tracing.recording import (
    DummySpanRecordingContext,
    OtelSpanRecordingContext,
    SpanRecordingContext,
)

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer as OtelApiTracer

    from lightning_ray.store.base import Store

logger = logging.getLogger(__name__)


class Tracer(ParallelWorkerBase):
    """What records spans; subclasses say where."""

    _store: Store | None = None

    def init_worker(self, worker_id: int, store: Store | None = None) -> None:  # type: ignore[override]
        """Set up in a worker; spans of traced attempts go to ``store``, if given."""
        super().init_worker(worker_id)
        self._store = store

    def trace_context(
        self,
        name: str | None = None,
        *,
        store: Store | None = None,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> AbstractAsyncContextManager[Any]:
        """Trace what runs inside."""
        raise NotImplementedError(f"{type(self).__name__} does not define trace_context")

    def get_last_trace(self) -> list[Span]:
        """The spans of the trace that ended last."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_last_trace")

    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Record an event at a time in Unix seconds, now by default."""
        raise NotImplementedError(f"{type(self).__name__} does not define create_span")

    def operation_context(
        self,
        name: str,
        attributes: Attributes | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> AbstractContextManager[SpanRecordingContext]:
        """A span around what runs inside, which becomes the parent of spans that begin there."""
        raise NotImplementedError(f"{type(self).__name__} does not define operation_context")

    async def trace_run_async(self, func: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """Await the function in a trace of its own."""
        async with self.trace_context(name=getattr(func, "__name__", None)):
            return await func(*args, **kwargs)

    def get_langchain_handler(self, tags: list[str] | None = None) -> Any:
        """A callback handler for LangChain: None, as model calls are seen at their client."""
        return None

    @contextmanager
    def lifespan(self, store: Store | None = None) -> Iterator[None]:
        """Set up as the only worker, and tear down."""
        self.init()
        try:
            self.init_worker(0, store)
            try:
                yield
            finally:
                self.teardown_worker(0)
        finally:
            self.teardown()


class OtelTracer(Tracer):
    """Records in the attempt at work: what is emitted, model calls, and every span made through OpenTelemetry."""

    def __init__(self) -> None:
        self._last: ContextVar[list[Span] | None] = ContextVar("lightning_ray_last_trace", default=None)

    def __reduce__(self) -> Any:
        return type(self), ()

    @asynccontextmanager
    async def trace_context(  # type: ignore[override]
        self,
        name: str | None = None,
        *,
        store: Store | None = None,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> AsyncIterator[OtelApiTracer]:
        """Trace an attempt; its spans go to the store when it ends, if both ids and a store are given.

        Raises ValueError for ids without a store, or one id without the other.
        """
        from lightning_ray.tracing import provider

        if (rollout_id is None) != (attempt_id is None):
            raise ValueError(f"rollout_id={rollout_id!r} and attempt_id={attempt_id!r} must be given together")
        store = store if store is not None else self._store
        if rollout_id is not None and store is None:
            raise ValueError(f"rollout {rollout_id!r} can be traced only into a store: give one to init_worker()")
        trace = AttemptTrace(rollout_id or "", attempt_id or "")
        try:
            with traced(trace):
                yield provider.own_tracer()
        finally:
            trace.finish()
            self._last.set(trace.as_spans())
            if store is not None and rollout_id is not None:
                await store.add_many_spans([Span.model_validate(row) for row in trace.spans])

    def get_last_trace(self) -> list[Span]:
        """The spans of the attempt at work here so far, otherwise of the one that ended last in this context."""
        if (trace := current_trace()) is not None:
            return trace.as_spans()
        return list(self._last.get() or [])

    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Record an event of the attempt at work. Raises RuntimeError outside of one."""
        status = status or TraceStatus()
        row = active_trace().add(name, attributes or {}, status.status_code, status.description, timestamp)
        return SpanCoreFields(
            name=name,
            status=status,
            attributes=row["attributes"],
            start_time=row["start_time"],
            end_time=row["end_time"],
        )

    @contextmanager
    def operation_context(  # type: ignore[override]
        self,
        name: str,
        attributes: Attributes | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Iterator[OtelSpanRecordingContext]:
        """A span of the attempt at work; times are Unix seconds. Raises RuntimeError outside of one."""
        from opentelemetry.trace import use_span

        from lightning_ray.tracing import provider

        active_trace()
        started = None if start_time is None else int(start_time * 1e9)
        span = provider.own_tracer().start_span(name, attributes=attributes, start_time=started)
        recording = OtelSpanRecordingContext(span)
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                yield recording
        except BaseException as error:
            recording.record_exception(error)
            raise
        finally:
            span.end(None if end_time is None else int(end_time * 1e9))


class AgentOpsTracer(OtelTracer):
    """Agent Lightning's default tracer by name. AgentOps itself is not used: model calls are traced at their client,
    for a tenth of its cost. The arguments are accepted and change nothing.
    """

    def __init__(self, *, agentops_managed: bool = True, instrument_managed: bool = True, daemon: bool = True):
        super().__init__()


class DummyTracer(Tracer):
    """Gives spans back and records none."""

    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """The span."""
        recording = DummySpanRecordingContext(name, attributes, timestamp)
        if status is not None:
            recording.record_status(status.status_code, status.description)
        recording.finalize(recording.start_time)
        return recording.get_recorded_span()

    @contextmanager
    def operation_context(  # type: ignore[override]
        self,
        name: str,
        attributes: Attributes | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Iterator[DummySpanRecordingContext]:
        """The span, to be read when the block has ended."""
        recording = DummySpanRecordingContext(name, attributes, start_time)
        try:
            yield recording
        except BaseException as error:
            recording.record_exception(error)
            raise
        finally:
            recording.finalize(end_time)


_active: ContextVar[tuple[Tracer, AttemptTrace | None] | None] = ContextVar("lightning_ray_tracer", default=None)
_ATTEMPTS = OtelTracer()


def get_active_tracer() -> Tracer | None:
    """What records here: the tracer set here, otherwise that of the attempt at work; None outside of both."""
    trace, active = current_trace(), _active.get()
    if active is not None and active[1] is trace:
        return active[0]
    return _ATTEMPTS if trace is not None else None


def set_active_tracer(tracer: Tracer) -> None:
    """Let ``tracer`` record in this context. Raises ValueError if one is set already."""
    trace, active = current_trace(), _active.get()
    if active is not None and active[1] is trace:
        raise ValueError(f"{type(active[0]).__name__} is active here already; clear_active_tracer() first")
    _active.set((tracer, trace))


def clear_active_tracer() -> None:
    """Undo ``set_active_tracer``."""
    _active.set(None)
