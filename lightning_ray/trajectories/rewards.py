"""The rewards that a rollout emitted, and what is trained on of them: the primary dimension, or a weighted sum."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ray.semconv import REWARD

_DIMENSION = re.compile(re.escape(REWARD) + r"\.(\d+)\.value")
Weights = Mapping[str, float] | None
"""By dimension; None takes the primary dimension alone."""


@dataclass(frozen=True)
class Emitted:
    """One reward: its dimensions by name, the primary first."""

    span_id: str
    values: dict[str, float]


def emitted_reward(span_id: str, attributes: Mapping[str, Any]) -> Emitted | None:
    """The reward among a span's attributes. A dimension without a name goes by its number."""
    found: dict[int, float] = {}
    for key, value in attributes.items():
        if (match := _DIMENSION.fullmatch(key)) and isinstance(value, (bool, int, float)):
            found[int(match[1])] = float(value)
    if 0 not in found:
        return None
    names = {index: str(attributes.get(f"{REWARD}.{index}.name", index)) for index in found}
    return Emitted(span_id, {names[index]: found[index] for index in sorted(found)})


def value_of(emitted: Emitted, weights: Weights) -> float | None:
    """What one reward is worth: its primary dimension, or the weighted sum of those it has; None if it has none."""
    if weights is None:
        return next(iter(emitted.values.values()))
    having = [weights[name] * value for name, value in emitted.values.items() if name in weights]
    return sum(having) if having else None


def final_reward(rewards: Sequence[Emitted], weights: Weights) -> float | None:
    """The reward of the whole rollout: the last one's primary dimension, or the weighted sum of the last value of each
    dimension. None if a dimension is missing.
    """
    if weights is None:
        return value_of(rewards[-1], None) if rewards else None
    last = _last_values(rewards)
    return sum(weight * last[name] for name, weight in weights.items()) if weights.keys() <= last.keys() else None


def missing_dimensions(rewards: Sequence[Emitted], weights: Weights) -> list[str]:
    """Weighted dimensions of which there is no value."""
    return sorted((weights or {}).keys() - _last_values(rewards).keys())


def _last_values(rewards: Sequence[Emitted]) -> dict[str, float]:
    return {name: value for emitted in rewards for name, value in emitted.values.items()}
