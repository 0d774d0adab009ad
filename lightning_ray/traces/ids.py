"""Ids of an attempt's trace, in OpenTelemetry's form, made of what the attempt is called.

Whoever knows rollout and attempt knows the trace: the runner that plays it, the replica that answers its calls, and the
step that trains on it put their spans under one trace id without telling each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

TRACE_HEADER = "traceparent"
"""W3C's header, by which a client says which span its request comes from: ``00-TRACE-SPAN-01``."""


def trace_id_of(rollout_id: str, attempt_id: str) -> str:
    """The trace's: 32 hexadecimal digits."""
    return _digest("trace", rollout_id, attempt_id, size=16)


def root_id_of(rollout_id: str, attempt_id: str) -> str:
    """Of the span that is the attempt itself, and the parent of all that have no other: 16 hexadecimal digits."""
    return _digest("root", rollout_id, attempt_id, size=8)


def part_id_of(span_id: str, name: str) -> str:
    """Of a part of a span that is told by the span itself."""
    return _digest("part", span_id, name, size=8)


def to_header(trace_id: str, span_id: str) -> str:
    """The value of the header."""
    return f"00-{trace_id}-{span_id}-01"


def parent_in(headers: Iterable[tuple[bytes, bytes]], trace_id: str) -> str | None:
    """The span that a request comes from, if its headers name one of this trace."""
    for name, value in headers:
        if name == b"traceparent":
            parts = value.decode("latin-1").split("-")
            return parts[2] if len(parts) >= 4 and parts[1] == trace_id and len(parts[2]) == 16 else None
    return None


def _digest(*parts: str, size: int) -> str:
    return blake2b("\0".join(parts).encode(), digest_size=size).hexdigest()
