"""A run's good rollouts as conversations, for fine-tuning elsewhere: OpenAI's chat format, or columns of a data set.

A conversation is one trajectory: the messages of its last call, and the answer. An assistant's message that no call of
the trajectory sampled (an example in the prompt, a turn that another trajectory has) has ``"weight": 0``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.adapters.messages import TraceToMessages
from lightning_ray.recorded import Recorded, View, read_recorded, task_of
from lightning_ray.span import Span
from lightning_ray.store.schema import read_spans
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.join import Trajectory
from lightning_ray.trajectories.keeping import keep_best
from lightning_ray.trajectories.settings import BatchSettings, Keep

Form = Literal["openai", "huggingface"]
Decode = Callable[[Sequence[int]], str]
Message = dict[str, Any]


@dataclass
class Counts:
    """What became of the rollouts, and of the conversations of those that were kept."""

    rollouts: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    conversations: int = 0
    without_messages: int = 0
    """Trajectories whose last call is in no API that has chat messages, or has no answer that can be told."""


def export(
    view: View,
    form: Form,
    keep: Keep,
    agent_match: str | None = None,
    decode: Decode | None = None,
    tokens: bool = False,
    reward_weights: dict[str, float] | None = None,
    policy: str | None = None,
) -> tuple[Iterator[dict[str, Any]], Counts]:
    """The lines, and what is counted while they are taken. ``decode`` gives the text of what was sampled where no
    client was traced that got it as a message. With ``tokens``, columns have ``token_ids`` and ``mask`` too. The reward
    is the primary one, or the sum that the weights make of its dimensions. With ``policy``, the calls and the reward of
    this one of several.
    """
    episodes = [episode for portion in read_recorded(view) for episode in portion.episodes(agent_match, policy)]
    group_of = {episode.rollout_id: task_of(episode.rollout) for episode in episodes}
    account = keep_best(episodes, group_of, keep, BatchSettings(reward_weights=reward_weights))
    counts = Counts(len(episodes), len(account.trained), account.drops_by_reason())
    kept = {episode.rollout_id: episode for episode in account.trained}
    return _lines(read_recorded(view, kept), kept, form, decode, tokens, counts), counts


def _lines(
    portions: Iterable[Recorded],
    kept: Mapping[str, Episode],
    form: Form,
    decode: Decode | None,
    tokens: bool,
    counts: Counts,
) -> Iterator[dict[str, Any]]:
    for portion in portions:
        by_rollout = _spans_of(portion)
        for rollout in portion.rollouts:
            episode = kept[rollout.rollout_id]
            calls = Calls(by_rollout.get(rollout.rollout_id, ()), episode.call_ids, decode)
            for trajectory in episode.trajectories:
                messages, tools = calls.conversation(trajectory)
                if not messages:
                    counts.without_messages += 1
                    continue
                counts.conversations += 1
                yield _line(form, messages, tools, episode, trajectory if tokens else None)


def _spans_of(portion: Recorded) -> dict[str, list[Span]]:
    """By rollout, the spans of the attempt that counts."""
    attempts = pa.array(list(portion.attempts.values()), pa.string())
    chosen = portion.spans.filter(pc.is_in(portion.spans["attempt_id"], attempts))
    found: dict[str, list[Span]] = {}
    for span in read_spans(chosen):
        found.setdefault(span.rollout_id, []).append(span)
    return found


def _line(
    form: Form, messages: list[Message], tools: list[Any] | None, episode: Episode, tokens: Trajectory | None
) -> dict[str, Any]:
    if form == "openai":
        return {"messages": messages, **({"tools": tools} if tools else {})}
    line: dict[str, Any] = {"messages": [_with_objects(message) for message in messages], "tools": tools}
    line |= {"rollout_id": episode.rollout_id, "reward": episode.reward}
    if tokens is not None:
        line |= {"token_ids": tokens.token_ids.tolist(), "mask": tokens.mask.tolist()}
    return line


def _with_objects(message: Message) -> Message:
    """The arguments of tool calls as objects, which is what chat templates take."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _object(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _object(arguments: Any) -> Any:
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):
        return arguments


class Calls:
    """The model calls of one attempt: as the engine captured them, and as clients were seen to get their answers."""

    def __init__(self, spans: Sequence[Span], call_ids: Sequence[str], decode: Decode | None) -> None:
        self._captured = {span.span_id: span for span in spans}
        self._ids = call_ids
        self._decode = decode
        self._adapter = TraceToMessages()
        known = set(call_ids)
        traced = [
            span for span in spans if span.span_id not in known and (span.model_extra or {}).get("prompt_ids") is None
        ]
        self._traced = [each["messages"] for each in self._adapter.adapt(traced)]
        self._places: Counter[str] = Counter()

    def conversation(self, trajectory: Trajectory) -> tuple[list[Message], list[Any] | None]:
        """Messages and tools of a trajectory; none if they cannot be told."""
        asked = [self._asked(turn.call) for turn in trajectory.turns]
        if not asked or asked[-1] is None:
            return [], None
        last, tools = asked[-1]
        answer = self._answer(last, trajectory)
        if answer is None:
            return [], None
        sampled = {len(known[0]) for known in asked if known is not None}
        messages = [*last, answer]
        return [_weighed(message, index in sampled) for index, message in enumerate(messages)], tools

    def _asked(self, number: int) -> tuple[list[Message], list[Any] | None] | None:
        """The messages of a captured call's request, and its tools."""
        span = self._captured[self._ids[number]]
        told = self._adapter.adapt([span])
        return (told[0]["messages"], told[0]["tools"]) if told else None

    def _answer(self, prompt: list[Message], trajectory: Trajectory) -> Message | None:
        """The answer to the last call's prompt: as a client got it, otherwise the text of what was sampled."""
        key = json.dumps(prompt, sort_keys=True, default=str)
        answers = [
            messages[len(prompt)]
            for messages in self._traced
            if len(messages) == len(prompt) + 1 and messages[:-1] == prompt
        ]
        place = self._places[key]
        self._places[key] += 1
        if place < len(answers):
            return answers[place]
        if self._decode is None:
            return None
        _, start, end = trajectory.turns[-1]
        return {"role": "assistant", "content": self._decode(np.asarray(trajectory.token_ids[start:end]).tolist())}


def _weighed(message: Message, sampled: bool) -> Message:
    return message if sampled or message["role"] != "assistant" else {**message, "weight": 0}
