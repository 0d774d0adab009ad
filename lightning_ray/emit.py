"""The emitters under their first name; they are in ``lightning_ray.emitter``, one subject a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.emitter import emit_annotation, emit_exception, emit_reward
from lightning_ray.emitter.rewards import number, reward_attributes
from lightning_ray.otel import flatten_attributes

__all__ = ["emit_annotation", "emit_exception", "emit_reward", "flatten", "number", "reward_attributes"]


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    return flatten_attributes(nested)
