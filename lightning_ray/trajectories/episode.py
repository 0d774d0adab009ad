"""One finished rollout, read back from its spans: its trajectories, reward, annotations and token counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.semconv import AGL_ANNOTATION
from lightning_ray.store.schema import read_spans
from lightning_ray.trajectories.join import ModelCall, Trajectory, join_calls
from lightning_ray.trajectories.selection import answered, captured_calls, of_agents
from lightning_ray.types import Attempt, Rollout


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

    @property
    def rollout_id(self) -> str:
        """Id of the rollout."""
        return self.rollout.rollout_id


def read_episodes(
    rollouts: Sequence[Rollout], spans: pa.Table, attempts: dict[str, str], agent_match: str | None = None
) -> list[Episode]:
    """Episodes of finished rollouts, in their order; ``attempts`` names the attempt that counts for each rollout.

    With ``agent_match``, only calls of agents in whose name it is found make trajectories.
    """
    episodes = {rollout.rollout_id: Episode(rollout) for rollout in rollouts}
    counted = spans.filter(pc.is_in(spans["attempt_id"], pa.array(list(attempts.values()), pa.string())))
    calls = answered(captured_calls(counted))
    for rollout_id, times in Counter(calls["rollout_id"].to_pylist()).items():
        episodes[rollout_id].calls = times
    for rollout_id, made in calls_of(of_agents(calls, agent_match)).items():
        episode = episodes[rollout_id]
        episode.trajectories = join_calls(made)
        episode.sampled_tokens = sum(len(call.sampled_ids) for call in made)
    for span in read_spans(counted.filter(pc.equal(counted["name"], AGL_ANNOTATION))):
        _annotate(episodes[span.rollout_id], span.attributes)
    return list(episodes.values())


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


def _annotate(episode: Episode, attributes: dict[str, object]) -> None:
    for key, value in attributes.items():
        if not isinstance(value, (bool, int, float)):
            continue
        if key == "agentlightning.reward.0.value":
            episode.reward = float(value)
        else:
            episode.annotations.setdefault(key, []).append(float(value))
