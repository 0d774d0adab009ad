"""Model calls -> trajectories: consecutive calls join where one's prompt extends the tokens before it exactly.

Invariant: a trajectory's tokens are exactly the last call's prompt and sampled ids, and those of each earlier call are
a prefix of them; ``mask`` is 1 on the ids that its calls sampled and on nothing else. Nothing is ever decoded and
encoded again: a call whose prompt does not extend what was seen starts a trajectory of its own. So of calls that branch
off in the midst of a trajectory each has its own, where all that came before is context: over all trajectories every
sampled token has mask 1 exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class ModelCall:
    """What the engine saw and sampled in one call; the last three are of one length."""

    prompt_ids: np.ndarray
    sampled_ids: np.ndarray
    logprobs: np.ndarray
    weight_versions: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.sampled_ids)


class Turn(NamedTuple):
    """One call of a trajectory: it sampled ``token_ids[start:end]``."""

    call: int
    """Its number among the rollout's calls, from 0."""
    start: int
    end: int


@dataclass
class Trajectory:
    """Tokens of one unbroken conversation; the arrays are of one length."""

    token_ids: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    weight_versions: np.ndarray
    turns: list[Turn] = field(default_factory=list)
    """The calls whose sampled ids have mask 1, in order."""
    broken_prefix: int | None = None
    """Length of the common prefix with the trajectory this call should have extended, if that failed."""
    step_rewards: np.ndarray | None = None
    """The reward of each call on its last sampled id, if calls have rewards."""

    @property
    def calls(self) -> int:
        """How many calls are trained on in it."""
        return len(self.turns)

    @property
    def prompt_length(self) -> int:
        """Tokens of the first prompt."""
        return self.turns[0].start if self.turns else len(self.token_ids)


class Chain:
    """Calls each of which extends the one before it. Its tokens are the last call's."""

    def __init__(self, number: int, call: ModelCall, broken_prefix: int | None = None):
        self._calls = [(number, call)]
        self._broken_prefix = broken_prefix

    def __len__(self) -> int:
        return len(self._last)

    @property
    def _last(self) -> ModelCall:
        return self._calls[-1][1]

    def append(self, number: int, call: ModelCall) -> None:
        """Add a call whose prompt starts with the chain's tokens."""
        self._calls.append((number, call))

    def common(self, ids: np.ndarray) -> int:
        """How many ids at the start are the chain's."""
        before = self._last.prompt_ids
        shared = common_prefix(before, ids)
        return shared if shared < len(before) else shared + common_prefix(self._last.sampled_ids, ids[shared:])

    def trajectory(self) -> Trajectory:
        """The arrays."""
        last = self._last
        length = len(last)
        mask, logprobs = np.zeros(length, np.int8), np.zeros(length, np.float32)
        versions = np.full(length, -1, np.int32)
        turns = [Turn(number, len(call.prompt_ids), len(call)) for number, call in self._calls]
        for (_, start, end), (_, call) in zip(turns, self._calls, strict=True):
            mask[start:end], logprobs[start:end], versions[start:end] = 1, call.logprobs, call.weight_versions
        token_ids = np.concatenate([last.prompt_ids, last.sampled_ids]).astype(np.int32, copy=False)
        return Trajectory(token_ids, mask, logprobs, versions, turns, self._broken_prefix)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading entries are equal."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n


def nearest(chains: Sequence[Chain], call: ModelCall) -> tuple[Chain, int] | None:
    """The longest chain that the call's prompt extends, otherwise the one it has most in common with at the start; and
    how many ids they have in common.
    """
    shared = [chain.common(call.prompt_ids) for chain in chains]
    if not shared:
        return None
    best = max(range(len(shared)), key=lambda i: (shared[i] == len(chains[i]), shared[i]))
    return chains[best], shared[best]


def join_calls(calls: Iterable[ModelCall]) -> list[Trajectory]:
    """Join calls, in the order they were made, each to the longest trajectory that its prompt extends."""
    chains: list[Chain] = []
    for number, call in enumerate(calls):
        found = nearest(chains, call)
        if found is not None and found[1] == len(found[0]):
            found[0].append(number, call)
        else:
            chains.append(Chain(number, call, None if found is None else found[1]))
    return [chain.trajectory() for chain in chains]
