"""Rewards of single calls: which call each reward belongs to, by the place of both in the trace.

As in Agent Lightning 0.3 (``adapters.reward_match``), on the same tree and with the same repair of it. A call that was
captured at its server has no place among the agent's spans; it gets that of the client's span around it, if its client
was traced, otherwise that of the tightest span which encloses it in time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from lightning_ray.adapters.reward_match import RewardMatchPolicy, match_rewards
from lightning_ray.adapters.tree import TraceTree
from lightning_ray.semconv import MODEL_CALL_NAMES
from lightning_ray.span import OtelResource, Span, TraceStatus
from lightning_ray.trajectories.rewards import Emitted, Weights, value_of

_CALLS = frozenset(MODEL_CALL_NAMES.values())


_NOTHING: dict[str, Any] = {
    "rollout_id": "",
    "attempt_id": "",
    "sequence_id": 0,
    "trace_id": "",
    "status": TraceStatus(),
    "attributes": {},
    "events": [],
    "links": [],
    "resource": OtelResource(),
}
"""What else a span has."""


class Place(NamedTuple):
    """Where a span is in the trace; times are Unix seconds."""

    span_id: str
    parent_id: str | None
    name: str
    start_time: float | None
    end_time: float | None


def step_rewards(
    places: Iterable[Place], rewards: Sequence[Emitted], calls: Collection[str], policy: str, weights: Weights
) -> dict[str, float]:
    """Span id of a call -> the reward that belongs to it. ``calls`` are the span ids of those that may have one."""
    spans = [_span(place) for place in places]
    if not spans or not rewards or not calls:
        return {}
    worth = {emitted.span_id: value_of(emitted, weights) for emitted in rewards}
    tree = TraceTree.from_spans(spans)
    tree.repair_hierarchy()
    _lift(tree)
    return match_rewards(tree, calls, RewardMatchPolicy(policy), lambda span: worth.get(span.span_id))


def _span(place: Place) -> Span:
    return Span.model_construct(**_NOTHING, **place._asdict())


def _lift(node: TraceTree) -> None:
    """Move what lies in a model call beside it: calls are one place with their client's spans, and enclose nothing."""
    for child in list(node.children):
        _lift(child)
        if child.span.name in _CALLS:
            node.children += child.children
            child.children = []
