"""Rewards: how they are emitted and found again. Dimension 0 is the primary one, which training uses."""

from __future__ import annotations

import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter

from lightning_ray.emitter.annotations import emit_annotation
from lightning_ray.otel import filter_and_unflatten_attributes
from lightning_ray.semconv import AGL_ANNOTATION, REWARD, RewardPydanticModel
from lightning_ray.span import SpanCoreFields

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")
_DIMENSIONS = TypeAdapter(list[RewardPydanticModel])
_AGENTOPS_OUTPUTS = ("agentops.task.output", "agentops.entity.output")


class NotARewardError(TypeError, ValueError):
    """A reward that is no real number."""


def emit_reward(
    reward: float | Mapping[str, float],
    *,
    primary_key: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    propagate: bool = True,
) -> SpanCoreFields:
    """Record a reward of the running rollout: a number, or several by name, of which ``primary_key`` is trained on.

    ``attributes`` may hold tags or links (``otel.make_tag_attributes``, ``otel.make_link_attributes``). Raises
    TypeError for a value that is no number, ValueError for one that is not finite, or several without their primary.
    """
    return emit_annotation({**reward_attributes(reward, primary_key), **(attributes or {})}, propagate)


def reward_attributes(reward: float | Mapping[str, float], primary_key: str | None = None) -> dict[str, str | float]:
    """The span attributes of a reward; index 0 is the primary dimension. Raises as ``emit_reward``."""
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
    """A reward as a float (numpy scalars are numbers). Raises TypeError or ValueError for what is no finite number."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise NotARewardError(f"reward {name!r} must be a number, got {type(value).__name__} {value!r:.80}")
    converted = float(value)
    if not math.isfinite(converted):
        raise NotARewardError(
            f"reward {name!r} is {converted}; it must be finite: emit nothing where there is no reward"
        )
    return converted


def reward(fn: F) -> F:
    """Emit what a function, async or not, returns as a reward; None is no reward. Deprecated: call emit_reward."""
    warnings.warn("@reward is deprecated; call emit_reward() with the value", DeprecationWarning, stacklevel=2)

    def emitted(result: Any) -> Any:
        if result is not None:
            emit_reward(result)
        return result

    @functools.wraps(fn)
    def rewarded(*args: Any, **kwargs: Any) -> Any:
        return emitted(fn(*args, **kwargs))

    @functools.wraps(fn)
    async def rewarded_async(*args: Any, **kwargs: Any) -> Any:
        return emitted(await fn(*args, **kwargs))

    return rewarded_async if inspect.iscoroutinefunction(fn) else rewarded  # type: ignore[return-value]


def get_rewards_from_span(span: Any) -> list[RewardPydanticModel]:
    """The dimensions of a span's reward, the primary first; none if it has no reward."""
    attributes = span.attributes or {}
    if not any(key.startswith(f"{REWARD}.") for key in attributes):
        return []
    return _DIMENSIONS.validate_python(filter_and_unflatten_attributes(attributes, REWARD))


def get_reward_value(span: Any) -> float | None:
    """The primary reward of a span, None if it has no reward. Reads the formats of Agent Lightning 0.1 and 0.2 too."""
    if (primary := (span.attributes or {}).get(f"{REWARD}.0.value")) is not None:
        return float(primary)
    return _older_value(span)


def _older_value(span: Any) -> float | None:
    attributes = span.attributes or {}
    for key in _AGENTOPS_OUTPUTS:
        output = attributes.get(key)
        if isinstance(output, str):
            try:
                output = json.loads(output)
            except ValueError:
                continue
        if isinstance(output, Mapping) and output.get("type") == "reward":
            return _number_or_none(output.get("value"))
    return _number_or_none(attributes.get("reward")) if span.name == AGL_ANNOTATION else None


def _number_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def is_reward_span(span: Any) -> bool:
    """Whether a span has a reward."""
    return get_reward_value(span) is not None


def find_reward_spans(spans: Iterable[S]) -> list[S]:
    """The spans that have a reward, in their order."""
    return [span for span in spans if is_reward_span(span)]


def find_final_reward(spans: Sequence[Any]) -> float | None:
    """The primary reward of the last span that has one; None if there is none."""
    return next((value for span in reversed(spans) if (value := get_reward_value(span)) is not None), None)
