"""Where an emitter's span goes: the tracer that is active here, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.otel import flatten_attributes, sanitize_attributes
from lightning_ray.span import Attributes
from lightning_ray.tracing.tracer import DummyTracer, Tracer, get_active_tracer

_NOWHERE = DummyTracer()


def recorder(what: str, propagate: bool) -> Tracer:
    """The tracer to emit to. Raises RuntimeError if nothing is being traced here."""
    if not propagate:
        return _NOWHERE
    tracer = get_active_tracer()
    if tracer is None:
        raise RuntimeError(
            f"nothing is being traced here, so {what} would be lost: emit from inside an agent's rollout, "
            "or with propagate=False"
        )
    return tracer


def extra_attributes(attributes: Mapping[str, Any] | None) -> Attributes:
    """Attributes that a caller adds to a span; whatever cannot be held becomes JSON."""
    return sanitize_attributes(flatten_attributes(attributes or {}))
