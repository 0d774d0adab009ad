"""What an agent says about itself: rewards and annotations, one call each, as in Agent Lightning 0.3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ray.semconv import AGL_ANNOTATION, AGL_EXCEPTION, REWARD
from lightning_ray.tracing import active_trace


def reward_attributes(reward: float | Mapping[str, float], primary_key: str | None = None) -> dict[str, str | float]:
    """The span attributes of a reward; index 0 is the primary dimension.

    Raises TypeError for a value that is no number, ValueError when several dimensions have no known primary.
    """
    if not isinstance(reward, Mapping):
        dimensions = {"primary": reward}
    else:
        if primary_key is None:
            raise ValueError(f"a reward of several dimensions {sorted(reward)} needs primary_key=")
        if primary_key not in reward:
            raise ValueError(f"primary_key={primary_key!r} is not among the reward's dimensions {sorted(reward)}")
        dimensions = {primary_key: reward[primary_key], **reward}
    attributes: dict[str, str | float] = {}
    for index, (name, value) in enumerate(dimensions.items()):
        attributes[f"{REWARD}.{index}.name"] = name
        attributes[f"{REWARD}.{index}.value"] = number(value, name)
    return attributes


def number(value: Any, name: str) -> float:
    """A reward as a float. Raises TypeError for anything that is no real number (numpy scalars are)."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"reward {name!r} must be a number, got {type(value).__name__} {value!r}")
    return float(value)


def emit_reward(
    reward: float | Mapping[str, float],
    *,
    primary_key: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record a reward of the running rollout; returns the span."""
    return emit_annotation({**reward_attributes(reward, primary_key), **(attributes or {})})


def emit_annotation(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Record key-value pairs about the running rollout; nested maps are flattened with dots. Returns the span.

    A numeric value is averaged by its key over a validation and shows up in the run's summary.
    """
    return active_trace().add(AGL_ANNOTATION, flatten(annotation))


def emit_exception(exception: BaseException) -> dict[str, Any]:
    """Record an exception of the running rollout; returns the span."""
    import traceback

    attributes = {
        "exception.type": type(exception).__name__,
        "exception.message": str(exception),
        "exception.stacktrace": "".join(traceback.format_exception(exception))[-8000:],
    }
    return active_trace().add(AGL_EXCEPTION, attributes, status="ERROR", description=str(exception))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
