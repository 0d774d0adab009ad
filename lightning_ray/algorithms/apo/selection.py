"""The seam of selection: which candidates are parents, and what becomes of their children."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.apo.candidates import Candidate, in_common
from lightning_ray.algorithms.apo.scoring import Scorer
from lightning_ray.algorithms.apo.state import SearchState
from lightning_ray.algorithms.apo.writer import Writer
from lightning_ray.together import together
from lightning_ray.types import Dataset

if TYPE_CHECKING:
    from lightning_ray.algorithms.apo.settings import APO


@dataclass
class Birth:
    """A new candidate, and the training tasks (index, task) that it came of, with its parent's rewards by index."""

    candidate: Candidate
    tasks: Sequence[tuple[int, Any]] = ()
    parent_rewards: dict[int, float] = field(default_factory=dict)


class Bench:
    """What a search works with."""

    def __init__(
        self,
        settings: APO[Any],
        state: SearchState,
        scorer: Scorer,
        writer: Writer,
        train: Dataset[Any],
        val: Dataset[Any],
    ):
        self.settings = settings
        self.state = state
        self.scorer = scorer
        self.writer = writer
        self.train = train
        self.val = val

    async def validate(self, candidates: Sequence[Candidate], indices: Sequence[int] | None = None) -> None:
        """Have the candidates' rewards for these validation tasks, or for all."""
        wanted = range(len(self.val)) if indices is None else indices
        await self.in_parallel([self.scorer.fill(candidate, wanted, self.val) for candidate in candidates])

    async def in_parallel(self, works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of all, ``candidates_at_once`` of them at a time."""
        at_once = asyncio.Semaphore(self.settings.candidates_at_once or len(works) or 1)

        async def one(work: Coroutine[Any, Any, Any]) -> Any:
            async with at_once:
                return await work

        try:
            return await together(*map(one, works))
        finally:
            for work in works:  # those that did not begin, as another failed
                work.close()

    def compare(self, candidates: Sequence[Candidate], indices: Sequence[int]) -> list[Candidate]:
        """Those that have a reward for any of these tasks, best first, by the mean over the tasks that they all have.

        The first of equals goes first. Raises InfrastructureError if there is no such task.
        """
        having = [candidate for candidate in candidates if candidate.mean(indices) is not None]
        tasks = in_common(having, indices)
        if not having or not tasks:
            raise self.scorer.nothing_counts(f"{len(candidates)} candidates")
        for candidate in having:
            candidate.score = candidate.mean(tasks)
        return sorted(having, key=lambda candidate: candidate.score or 0.0, reverse=True)

    def consider(self, candidate: Candidate) -> None:
        """Make a candidate that was validated in full the best, if it is strictly better than the best so far."""
        state, everything = self.state, range(len(self.val))
        best = state.best_candidate
        tasks = in_common([best, candidate], everything)
        known, found = best.mean(tasks), candidate.mean(tasks)
        if state.best_score is None or (known is not None and found is not None and found > known):
            state.best = candidate.version
        state.best_score = state.best_candidate.mean(everything)


class Selection(ABC):
    """See the module."""

    def __init__(self, bench: Bench):
        self.bench = bench

    @abstractmethod
    def parents(self, rng: random.Random) -> list[Candidate]:
        """``beam_width`` candidates whose children are to be made; one may be among them more than once."""

    def merges(self, rng: random.Random) -> list[Coroutine[Any, Any, Birth | None]]:
        """Work that makes further candidates of two each."""
        return []

    @abstractmethod
    async def judge(self, births: Sequence[Birth]) -> None:
        """Score the new candidates, decide whose children come next (``state.beam``), and what is best."""
