"""What a critique gets to see of rollouts: the task, what was said, what the agent noted, its reward and its error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ray.adapters import TraceAdapter, TracerTraceToTriplet, TraceToMessages
from lightning_ray.algorithms.apo.scoring import Played
from lightning_ray.emitter import get_message_value, get_rewards_from_span, is_reward_span
from lightning_ray.semconv import AGL_ANNOTATION
from lightning_ray.span import Span

if TYPE_CHECKING:
    from lightning_ray.algorithms.apo.settings import APO

CUT = "\n[... {} characters left out ...]\n"


def describe(played: Played, adapter: TraceAdapter[Any], settings: APO[Any]) -> dict[str, Any]:
    """The fields that critique files have of one rollout, as texts; what is not to be shown is None."""
    return {
        "task": as_text(played.task) if settings.show_tasks else None,
        "status": played.rollout.status,
        "reward": "none" if played.reward is None else f"{played.reward:g}",
        "rewards": dimensions(played.spans),
        "talk": cut(talk(adapter.adapt(played.spans)), settings.max_run_characters),
        "notes": notes(played.spans),
        "error": played.error if settings.show_errors else None,
    }


def adapter_for_critiques(given: TraceAdapter[Any]) -> TraceAdapter[Any]:
    """The one that was given, or TraceToMessages where a Trainer has its default."""
    return TraceToMessages() if type(given) is TracerTraceToTriplet else given


def talk(adapted: Any) -> str:
    """Conversations as text, without those that a later one goes on with; anything else as JSON."""
    if not is_conversations(adapted):
        return as_text(adapted)
    texts: list[str] = ["\n".join(map(_said, one["messages"])) for one in adapted]
    whole = [text for at, text in enumerate(texts) if not any(later.startswith(text) for later in texts[at + 1 :])]
    return "\n---\n".join(whole)


def is_conversations(adapted: Any) -> bool:
    """Whether it is what TraceToMessages makes."""
    return isinstance(adapted, list) and all(isinstance(one, Mapping) and "messages" in one for one in adapted)


def _said(message: Mapping[str, Any]) -> str:
    parts = [as_text(message["content"])] if message.get("content") else []
    for call in message.get("tool_calls") or ():
        parts.append(f"calls {call['function']['name']}({call['function']['arguments']})")
    return f"{message['role']}: {' '.join(parts)}"


def notes(spans: Sequence[Span]) -> list[str]:
    """What the agent left by emit_message and emit_annotation."""
    found = [message for span in spans if isinstance(message := get_message_value(span), str)]
    for span in spans:
        if span.name == AGL_ANNOTATION and not is_reward_span(span):
            found += [f"{key}: {value}" for key, value in span.attributes.items()]
    return found


def dimensions(spans: Sequence[Span]) -> str | None:
    """The dimensions of the last reward, where it has several."""
    rewards = [rewards for span in spans if len(rewards := get_rewards_from_span(span)) > 1]
    return ", ".join(f"{one.name} {one.value:g}" for one in rewards[-1]) if rewards else None


def as_text(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def cut(text: str, most: int) -> str:
    """The text, without its middle if it is longer than ``most`` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return text[:half] + CUT.format(len(text) - 2 * half) + text[len(text) - half :]
