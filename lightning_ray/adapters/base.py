"""The seam: an adapter turns one thing into another, and can be called like a function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, Field

from lightning_ray.adapters.captured import with_words
from lightning_ray.span import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T_from = TypeVar("T_from")
T_to = TypeVar("T_to")


class Triplet(BaseModel):
    """One model call: what was asked, what was answered, and the reward that followed, if one did."""

    prompt: Any
    response: Any
    reward: float | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class Adapter(Generic[T_from, T_to]):
    """Override ``adapt``."""

    def __call__(self, source: T_from, /) -> T_to:
        return self.adapt(source)

    def adapt(self, source: T_from, /) -> T_to:
        """The source in the target's form."""
        raise NotImplementedError(f"{type(self).__name__} does not define adapt")


class OtelTraceAdapter(Adapter[Sequence["ReadableSpan"], T_to], Generic[T_to]):
    """From spans of OpenTelemetry's SDK."""


class TraceAdapter(Adapter[Sequence[Span], T_to], Generic[T_to]):
    """From our spans."""


class TraceToTripletBase(TraceAdapter[list[Triplet]]):
    """From our spans to triplets."""


def our_spans(source: Iterable[Any]) -> list[Span]:
    """Spans of either kind as ours, captured model calls with their words."""
    return [
        with_words(span) if isinstance(span, Span) else Span.from_opentelemetry(span, "", "", index)
        for index, span in enumerate(source)
    ]
