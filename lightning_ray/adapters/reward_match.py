"""Which call a reward belongs to, as in Agent Lightning 0.3: one that has ended before, the latest without a reward."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from enum import StrEnum

from lightning_ray.adapters.tree import TraceTree
from lightning_ray.emitter.rewards import get_reward_value
from lightning_ray.span import Span


class RewardMatchPolicy(StrEnum):
    """Among which calls a reward looks for its own."""

    FIRST_SIBLING = "first_sibling"
    """Among the reward's own siblings."""
    FIRST_OCCURRENCE = "first_occurrence"
    """Anywhere in the trace."""


def match_rewards(
    tree: TraceTree,
    calls: Container[str],
    policy: RewardMatchPolicy,
    value_of: Callable[[Span], float | None] = get_reward_value,
) -> dict[str, float]:
    """Span id of a call -> its reward; ``calls`` are the ids of those that count. A reward that finds none is lost."""
    if policy is RewardMatchPolicy.FIRST_OCCURRENCE:
        families: Iterable[list[TraceTree]] = [tree.traverse()]
    else:
        families = [node.children for node in tree.traverse()]
    rewards: dict[str, float] = {}
    for family in families:
        before: list[TraceTree] = []
        for node in sorted(family, key=lambda one: one.start_time or 0.0):
            if node.id in calls:
                before.append(node)
            elif (value := value_of(node.span)) is not None:
                _assign(value, node, before, rewards)
    return rewards


def _assign(value: float, at: TraceTree, calls: list[TraceTree], rewards: dict[str, float]) -> None:
    for call in reversed(calls):
        if call.id not in rewards and (call.end_time or 0.0) <= (at.start_time or 0.0):
            rewards[call.id] = value
            return
