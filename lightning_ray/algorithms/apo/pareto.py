"""Reflective Pareto search (GEPA: Agrawal et al., 2025, arXiv:2507.19457).

A front is kept over the validation tasks: candidates that no other is at least as good as everywhere and better than
somewhere. Parents are drawn in proportion to the tasks on which they are best, so that what only helps some tasks is
not lost. A child is first compared with its parent on the tasks that it came of, and validated only if it is better
there. Two of the front from different lines are merged: of templates that one line alone changed, its version is
taken; what both changed is for the model to unite.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from itertools import combinations
from typing import Any

from lightning_ray.algorithms.apo.candidates import Candidate, common_ancestor
from lightning_ray.algorithms.apo.prompt_files import MERGE, read_prompts
from lightning_ray.algorithms.apo.selection import Bench, Birth, Selection
from lightning_ray.types import PromptTemplate


class Pareto(Selection):
    """See the module."""

    def __init__(self, bench: Bench):
        super().__init__(bench)
        self._files = read_prompts("merge_prompt_files", bench.settings.merge_prompt_files, MERGE)

    def parents(self, rng: random.Random) -> list[Candidate]:
        """Drawn from the front, each draw in proportion to the tasks on which a candidate is best."""
        front = self._front()
        won = wins(front)
        weights = [won[candidate.version] for candidate in front]
        if not any(weights):  # nothing was validated yet
            weights = [1] * len(front)
        return rng.choices(front, weights, k=self.bench.settings.beam_width)

    def merges(self, rng: random.Random) -> list[Coroutine[Any, Any, Birth | None]]:
        """Up to ``merges`` pairs of the front that neither descend from each other nor were merged before."""
        state = self.bench.state
        versions = sorted(state.beam, key=lambda version: int(version[1:]))
        pairs = [pair for pair in combinations(versions, 2) if pair not in state.merged]
        rng.shuffle(pairs)
        works: list[Coroutine[Any, Any, Birth | None]] = []
        for one, other in pairs:
            ancestor = common_ancestor(state.candidates, one, other)
            if ancestor is not None and len(works) < self.bench.settings.merges:
                state.merged.append((one, other))
                works.append(self._merge(one, other, ancestor, rng.randrange(2**32)))
        return works

    async def judge(self, births: Sequence[Birth]) -> None:
        """Those that are better than their parents on their own tasks are validated in full; then the front is anew."""
        bench, state = self.bench, self.bench.state
        passed = await bench.in_parallel([self._passes(birth) for birth in births])
        new = [birth.candidate for birth, well in zip(births, passed, strict=True) if well]
        await bench.validate([*self._front(), *new])
        validated = [candidate for candidate in [*self._front(), *new] if candidate.rewards]
        if not validated:
            raise bench.scorer.nothing_counts(f"{len(new) + len(state.beam)} candidates")
        for candidate in validated:
            candidate.score = candidate.mean(range(len(bench.val)))
            bench.consider(candidate)
        state.beam = [candidate.version for candidate in pareto_front(validated)]

    async def _passes(self, birth: Birth) -> bool:
        if not birth.tasks:
            return True
        played = await self.bench.scorer.play(birth.candidate, birth.tasks, "train")
        own = {one.index: one.reward for one in played if one.reward is not None}
        common = [index for index in own if index in birth.parent_rewards]
        if not common:
            return False
        before = sum(birth.parent_rewards[index] for index in common) / len(common)
        after = sum(own[index] for index in common) / len(common)
        birth.candidate.trial = (before, after)
        return after > before

    async def _merge(self, one: str, other: str, ancestor: str, seed: int) -> Birth | None:
        state, rng = self.bench.state, random.Random(seed)
        first, second, origin = (state.candidates[version].templates for version in (one, other, ancestor))
        templates: dict[str, PromptTemplate] = {}
        for name in first:
            chosen = changed_by_one(first, second, origin, name)
            if chosen is None:
                chosen = await self.bench.writer.merge(rng.choice(self._files), first, second, origin, name)
            templates[name] = chosen
        changed = tuple(name for name in templates if templates[name] != first[name])
        return Birth(Candidate(version="", templates=templates, origin="merge", parents=(one, other), changed=changed))

    def _front(self) -> list[Candidate]:
        return [self.bench.state.candidates[version] for version in self.bench.state.beam]


def changed_by_one(
    first: Mapping[str, PromptTemplate],
    second: Mapping[str, PromptTemplate],
    origin: Mapping[str, PromptTemplate],
    name: str,
) -> PromptTemplate | None:
    """The version of a template that one line alone changed, or that both have; None if each has its own."""
    if first[name] in (second[name], origin[name]):
        return second[name]
    return first[name] if second[name] == origin[name] else None


def dominates(one: Candidate, other: Candidate) -> bool:
    """Whether one is at least as good on every task that the other has a reward for, and better on one."""
    pairs = [(one.rewards.get(task, float("-inf")), reward) for task, reward in other.rewards.items()]
    return all(mine >= yours for mine, yours in pairs) and any(mine > yours for mine, yours in pairs)


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that none dominates, in order; of several with the same rewards the first."""
    front: list[Candidate] = []
    for candidate in candidates:
        alike = any(kept.rewards == candidate.rewards for kept in front)
        if not alike and not any(dominates(other, candidate) for other in candidates):
            front.append(candidate)
    return front


def wins(candidates: Sequence[Candidate]) -> Counter[str]:
    """Version -> on how many tasks it is best, alone or with others."""
    best: dict[int, float] = {}
    for candidate in candidates:
        for task, reward in candidate.rewards.items():
            best[task] = max(reward, best.get(task, reward))
    won: Counter[str] = Counter()
    for candidate in candidates:
        won[candidate.version] = sum(reward == best[task] for task, reward in candidate.rewards.items())
    return won
