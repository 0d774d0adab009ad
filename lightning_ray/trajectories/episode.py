"""One finished rollout, read back from its spans: its trajectories, reward, annotations and token counts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.semconv import AGL_ANNOTATION, DROPPED_SPAN, IMAGE_SPAN, REWARD, SUPERSEDED_SPAN, TRAINED_SPAN
from lightning_ray.span import Span
from lightning_ray.store.schema import read_spans
from lightning_ray.trajectories.join import ModelCall, Trajectory, join_calls
from lightning_ray.trajectories.rewards import Emitted, emitted_reward, final_reward, value_of
from lightning_ray.trajectories.selection import answered, captured_calls, of_agents, of_policy, rows_where
from lightning_ray.trajectories.steps import Place
from lightning_ray.types import Attempt, Rollout

_PRIMARY = f"{REWARD}.0.value"
_NO_PLACE = (IMAGE_SPAN, SUPERSEDED_SPAN, TRAINED_SPAN, DROPPED_SPAN)
"""Spans that tell of others, and are no part of what the agent did."""


@dataclass
class Episode:
    """What one rollout came to. ``reward`` is the last primary reward, None if there was none."""

    rollout: Rollout
    trajectories: list[Trajectory] = field(default_factory=list)
    reward: float | None = None
    annotations: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 0
    """Of all agents."""
    sampled_tokens: int = 0
    """In the trajectories."""
    rewards: list[Emitted] = field(default_factory=list)
    """All that were emitted, in order."""
    call_ids: list[str] = field(default_factory=list)
    """Span ids of the calls in the trajectories, by their numbers."""
    places: list[Place] = field(default_factory=list, repr=False)
    """Of its spans in the trace."""
    own_weights: dict[str, float] | None = None
    """Dimensions of the reward that are the policy's own, if the rollout emitted any: ``reward`` is their sum."""
    attempt_id: str | None = None
    """The attempt that counts, if it left spans."""

    @property
    def rollout_id(self) -> str:
        """Id of the rollout."""
        return self.rollout.rollout_id

    @property
    def outcome(self) -> float | None:
        """The rollout's reward, whatever of it is one policy's own."""
        return self.reward if self.own_weights is None else final_reward(self.rewards, None)


def read_episodes(
    rollouts: Sequence[Rollout],
    spans: pa.Table,
    attempts: dict[str, str],
    agent_match: str | None = None,
    policy: str | None = None,
) -> list[Episode]:
    """Episodes of finished rollouts, in their order; ``attempts`` names the attempt that counts for each rollout.

    With ``agent_match``, only calls of agents in whose name it is found make trajectories. With ``policy``, only calls
    that the policy of this name answered, and dimensions of the reward that have its name, or that of an agent of its
    own, are its reward.
    """
    episodes = {each.rollout_id: Episode(each, attempt_id=attempts.get(each.rollout_id)) for each in rollouts}
    counted = rows_where(spans, pc.is_in(spans["attempt_id"], pa.array(list(attempts.values()), pa.string())))
    calls = answered(captured_calls(counted))
    for rollout_id, times in Counter(calls["rollout_id"].to_pylist()).items():
        episodes[rollout_id].calls = times
    chosen = of_agents(of_policy(calls, policy), agent_match)
    for rollout_id, made in calls_of(chosen).items():
        episode = episodes[rollout_id]
        episode.trajectories = join_calls(made)
        episode.sampled_tokens = sum(len(call.sampled_ids) for call in made)
    for rollout_id, span_id in _rows(chosen, "rollout_id", "span_id"):
        episodes[rollout_id].call_ids.append(span_id)
    for rollout_id, *place in _rows(counted, "rollout_id", *Place._fields):
        if place[2] not in _NO_PLACE:
            episodes[rollout_id].places.append(Place(*place))
    for span in read_spans(counted.filter(pc.equal(counted["name"], AGL_ANNOTATION))):
        _annotate(episodes[span.rollout_id], span)
    if policy is not None:
        for episode in episodes.values():
            _take_own_reward(episode, policy, agent_match)
    return list(episodes.values())


def _take_own_reward(episode: Episode, policy: str, agent_match: str | None) -> None:
    """Have the dimensions that are the policy's own as its reward, if there are any."""
    names = {name for emitted in episode.rewards for name in emitted.values}
    own = {name for name in names if name == policy or (agent_match is not None and re.search(agent_match, name))}
    if own:
        episode.own_weights = dict.fromkeys(sorted(own), 1.0)
        episode.reward = final_reward(episode.rewards, episode.own_weights)


def _rows(table: pa.Table, *columns: str) -> Iterable[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


def last_attempts(attempts: Sequence[Attempt]) -> dict[str, str]:
    """The attempt that counts for each rollout: its last."""
    return {attempt.rollout_id: attempt.attempt_id for attempt in sorted(attempts, key=lambda a: a.sequence_id)}


def calls_of(table: pa.Table) -> dict[str, list[ModelCall]]:
    """The model calls of each rollout, in order; every row of ``table`` must have token ids."""
    calls: dict[str, list[ModelCall]] = defaultdict(list)
    columns = ("prompt_ids", "sampled_ids", "logprobs", "weight_versions")
    lists = [table[name].combine_chunks() for name in columns]
    for index, rollout_id in enumerate(table["rollout_id"].to_pylist()):
        values = [np.asarray(column[index].values) for column in lists]
        calls[rollout_id].append(ModelCall(*values))
    return calls


def _annotate(episode: Episode, span: Span) -> None:
    for key, value in span.attributes.items():
        if isinstance(value, (bool, int, float)) and key != _PRIMARY:
            episode.annotations.setdefault(key, []).append(float(value))
    if (emitted := emitted_reward(span.span_id, span.attributes)) is not None:
        episode.rewards.append(emitted)
        episode.reward = value_of(emitted, None)
