"""OpenTelemetry's spans become those of the attempt in which they begin.

Every tracer provider of the SDK gets one processor of ours: those that agents and frameworks make, whenever they make
them, and our own, which is the process's provider until another is set. A span belongs to the attempt of its parent,
otherwise to the one at work where it begins; our own provider records nothing outside of attempts. Providers that other
code made before the first attempt and did not set as the process's are not seen.
"""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.util._once import Once

from lightning_ray.span import span_id_hex
from lightning_ray.tracing import threads
from lightning_ray.tracing.attempt import AttemptTrace, current_trace, live
from lightning_ray.tracing.rows import ObservedSpan, row_of


def attempt_of(context: Context | None) -> AttemptTrace | None:
    """The attempt that a span beginning in ``context`` (by default the current one) belongs to, if it has not ended."""
    parent = api.get_current_span(context).get_span_context()
    trace = live.get(parent.span_id) or live.get(parent.trace_id) or current_trace()
    return None if trace is None or trace.ended else trace


class AttemptProcessor(SpanProcessor):
    """Hands every span to its attempt."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Find the attempt, and keep it until the span ends."""
        if (trace := attempt_of(parent_context)) is not None:
            span_id = span.get_span_context().span_id
            live[span_id] = trace
            trace.opened(span_id_hex(span_id), ObservedSpan(span, trace))

    def on_end(self, span: ReadableSpan) -> None:
        """Record the span, unless its attempt has ended."""
        context = span.get_span_context()
        trace = live.pop(context.span_id, None) if context is not None else None
        if context is not None and trace is not None:
            trace.close(span_id_hex(context.span_id), functools.partial(row_of, span, trace))


class AttemptSampler(Sampler):
    """Records inside of attempts only."""

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: api.SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[api.Link] | None = None,
        trace_state: api.TraceState | None = None,
    ) -> SamplingResult:
        """Whether there is an attempt."""
        return SamplingResult(Decision.DROP) if attempt_of(parent_context) is None else _recorded(attributes)

    def get_description(self) -> str:
        """Its name."""
        return "AttemptSampler"


def _recorded(attributes: Any) -> SamplingResult:
    return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)


class SystemIdGenerator(IdGenerator):
    """Ids of the operating system's randomness: an agent that seeds ``random`` does not repeat them."""

    def generate_span_id(self) -> int:
        """64 bits."""
        return secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        """128 bits."""
        return secrets.randbits(128) or 1


PROCESSOR = AttemptProcessor()
_UNLIMITED = SpanLimits(
    max_span_attributes=SpanLimits.UNSET,
    max_events=SpanLimits.UNSET,
    max_links=SpanLimits.UNSET,
    max_event_attributes=SpanLimits.UNSET,
    max_link_attributes=SpanLimits.UNSET,
)
OWN = TracerProvider(
    sampler=AttemptSampler(),
    resource=Resource.get_empty(),
    shutdown_on_exit=False,
    id_generator=SystemIdGenerator(),
    span_limits=_UNLIMITED,
)
"""Our provider."""
_lock = threading.Lock()
_installed = False


def install() -> None:
    """Trace this process's spans from now on; once is enough."""
    global _installed
    if _installed:
        return
    with _lock:
        if _installed:
            return
        OWN.add_span_processor(PROCESSOR)
        _attend_new_providers()
        present = api.get_tracer_provider()
        if isinstance(present, api.ProxyTracerProvider):
            api.set_tracer_provider(OWN)
            api._TRACER_PROVIDER_SET_ONCE = Once()  # ours stands in: the process may still set its own
        elif (add := getattr(present, "add_span_processor", None)) is not None:
            add(PROCESSOR)
        threads.install()
        _installed = True


def _attend_new_providers() -> None:
    made = TracerProvider.__init__

    @functools.wraps(made)
    def make_attended(self: TracerProvider, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.add_span_processor(PROCESSOR)

    TracerProvider.__init__ = make_attended  # type: ignore[method-assign]


def own_tracer() -> api.Tracer:
    """A tracer that records in every attempt, whatever the process's provider samples."""
    install()
    return OWN.get_tracer("lightning_ray")


def root_context(trace: AttemptTrace) -> Context:
    """A context in which the attempt is the parent, and nothing of what surrounds it is known."""
    root = api.SpanContext(
        int(trace.trace_id, 16), int(trace.root_id, 16), is_remote=True, trace_flags=api.TraceFlags(1)
    )
    return api.set_span_in_context(api.NonRecordingSpan(root), Context())
