"""Model calls -> trajectories: consecutive calls join where one's prompt extends the tokens before it exactly.

Invariant: concatenating a trajectory's tokens along its calls gives exactly the last call's prompt and sampled ids;
``mask`` is 1 on sampled ids and on nothing else. Nothing is ever decoded and encoded again: a call whose prompt
does not extend what was seen starts a trajectory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class ModelCall:
    """What the engine saw and sampled in one call; the last three are of one length."""

    prompt_ids: np.ndarray
    sampled_ids: np.ndarray
    logprobs: np.ndarray
    weight_versions: np.ndarray


@dataclass
class Trajectory:
    """Tokens of one unbroken conversation; four arrays of one length L."""

    token_ids: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    weight_versions: np.ndarray
    calls: int = 1
    broken_prefix: int | None = field(default=None)
    """Length of the common prefix with the trajectory this call should have extended, if that failed."""

    @classmethod
    def of(cls, call: ModelCall) -> Trajectory:
        """A trajectory of one call."""
        started = cls(
            np.empty(0, np.int32), np.empty(0, np.int8), np.empty(0, np.float32), np.empty(0, np.int32), calls=0
        )
        started.extend(call)
        return started

    def extend(self, call: ModelCall) -> None:
        """Append a call whose prompt starts with ``token_ids``."""
        context = call.prompt_ids[len(self.token_ids) :]
        sampled = len(call.sampled_ids)
        self.token_ids = np.concatenate([self.token_ids, context, call.sampled_ids]).astype(np.int32)
        self.mask = np.concatenate([self.mask, np.zeros(len(context)), np.ones(sampled)]).astype(np.int8)
        self.logprobs = np.concatenate([self.logprobs, np.zeros(len(context)), call.logprobs]).astype(np.float32)
        self.weight_versions = np.concatenate(
            [self.weight_versions, np.full(len(context), -1), call.weight_versions]
        ).astype(np.int32)
        self.calls += 1


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading entries are equal."""
    n = min(len(a), len(b))
    different = np.nonzero(a[:n] != b[:n])[0]
    return int(different[0]) if len(different) else n


def nearest(trajectories: Sequence[Trajectory], call: ModelCall) -> tuple[Trajectory, int] | None:
    """The longest trajectory that the call's prompt extends, otherwise the one it has most in common with at the
    start; and how many ids they have in common.
    """
    shared = [common_prefix(t.token_ids, call.prompt_ids) for t in trajectories]
    if not shared:
        return None
    best = max(range(len(shared)), key=lambda i: (shared[i] == len(trajectories[i].token_ids), shared[i]))
    return trajectories[best], shared[best]


def join_calls(calls: Iterable[ModelCall]) -> list[Trajectory]:
    """Join calls, in the order they were made, each to the longest trajectory that its prompt extends."""
    trajectories: list[Trajectory] = []
    for call in calls:
        found = nearest(trajectories, call)
        if found is not None and found[1] == len(found[0].token_ids):
            found[0].extend(call)
            continue
        started = Trajectory.of(call)
        started.broken_prefix = None if found is None else found[1]
        trajectories.append(started)
    return trajectories
