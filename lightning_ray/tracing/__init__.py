"""Tracing: what happens inside an attempt becomes that attempt's spans, and no other's.

``attempt`` holds the attempt at work and what it has recorded, ``provider`` feeds it from OpenTelemetry, ``threads``
carries it into threads, ``tracer`` is the interface of Agent Lightning 0.3 on top. Where the spans go is the runner's.
"""

from lightning_ray.tracing.attempt import AttemptTrace, OpenSpan, active_trace, current_trace, traced
from lightning_ray.tracing.recording import SpanRecordingContext
from lightning_ray.tracing.tracer import (
    AgentOpsTracer,
    DummyTracer,
    OtelTracer,
    Tracer,
    clear_active_tracer,
    get_active_tracer,
    set_active_tracer,
)

__all__ = [
    "AgentOpsTracer",
    "AttemptTrace",
    "DummyTracer",
    "OpenSpan",
    "OtelTracer",
    "SpanRecordingContext",
    "Tracer",
    "active_trace",
    "clear_active_tracer",
    "current_trace",
    "get_active_tracer",
    "set_active_tracer",
    "traced",
]
