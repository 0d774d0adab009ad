"""The search: rounds of parents, critiques, edits and a selection.

Everything random in a round follows from the seed and the round's number, so that a round which was broken off is
made again as it would have been.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning_ray.adapters import TraceAdapter
from lightning_ray.algorithms.apo.beam import Beam
from lightning_ray.algorithms.apo.candidates import Candidate
from lightning_ray.algorithms.apo.experiments import describe
from lightning_ray.algorithms.apo.optimizer import SpendReached
from lightning_ray.algorithms.apo.pareto import Pareto
from lightning_ray.algorithms.apo.prompt_files import CRITIQUE, EDIT, PromptFile, read_prompts
from lightning_ray.algorithms.apo.selection import Bench, Birth, Selection
from lightning_ray.algorithms.apo.state import Round
from lightning_ray.algorithms.apo.writer import NoEdit
from lightning_ray.algorithms.batches import batch_iter_over_dataset
from lightning_ray.errors import InfrastructureError

SELECTIONS: dict[str, type[Selection]] = {"beam": Beam, "pareto": Pareto}


@dataclass(frozen=True)
class Branch:
    """One child to be made: of whom, in which template, from which training tasks, asked for how."""

    parent: Candidate
    name: str
    tasks: Sequence[tuple[int, Any]]
    critique: PromptFile
    edit: PromptFile


class Search:
    """See the module. ``tell`` shows a line to a person."""

    def __init__(self, bench: Bench, adapter: TraceAdapter[Any], tell: Callable[[str], None]):
        self._bench = bench
        self._settings = bench.settings
        self._state = bench.state
        self._adapter = adapter
        self._tell = tell
        self._selection = SELECTIONS[self._settings.selection](bench)
        self._critiques = read_prompts("gradient_prompt_files", self._settings.gradient_prompt_files, CRITIQUE)
        self._edits = read_prompts("apply_edit_prompt_files", self._settings.apply_edit_prompt_files, EDIT)
        rng, size = random.Random(f"{self._settings.seed}/train"), self._settings.gradient_batch_size
        batches = batch_iter_over_dataset(range(len(bench.train)), size, rng)
        self._batches = islice(batches, self._state.train_batches, None)
        self._failures: list[InfrastructureError] = []
        """Of the children of a round."""

    async def validate_seed(self) -> None:
        """The score that has to be beaten."""
        seed = self._state.candidates["v0"]
        await self._bench.validate([seed])
        seed.score = self._state.seed_score = seed.mean(range(len(self._bench.val)))
        if seed.score is None:
            raise self._bench.scorer.nothing_counts("the seed")
        self._bench.consider(seed)

    def over(self) -> bool:
        """Whether there is nothing more to do."""
        state, target, score = self._state, self._settings.target_score, self._state.best_score
        if state.stopped is None and target is not None and score is not None and score >= target:
            state.stopped = f"target_score={target:g} is reached"
        return state.round >= self._settings.beam_rounds or state.stopped is not None

    async def play_round(self) -> str:
        """One more round; returns a line about it. Raises InfrastructureError if each of its children failed by one."""
        state, number, began = self._state, self._state.round + 1, time.perf_counter()
        drawn, merged = state.train_batches, list(state.merged)
        births = await self._births(number)
        if not births and state.stopped is not None:
            state.train_batches, state.merged = drawn, merged
            return "no new candidate"
        self._tell(f"round {number}: {len(births)} candidates meet {len(state.beam)} of the rounds before")
        await self._selection.judge(births)
        state.round = number
        state.history.append(
            Round(
                round=number,
                made=[birth.candidate.version for birth in births],
                beam=list(state.beam),
                best=state.best,
                best_score=state.best_score,
                rollouts=state.rollouts,
                seconds=round(time.perf_counter() - began, 3),
            )
        )
        best = f"best {state.best} {shown(state.best_score)}"
        return f"{len(births)} made, {best}, {state.rollouts} rollouts"

    async def _births(self, number: int) -> list[Birth]:
        """The candidates of a round, the new ones under versions of their own.

        One that was found before and went no further is as good as new, and brings the rewards that it has: the tasks
        it met others on may have been of no use to it.
        """
        rng = random.Random(f"{self._settings.seed}/round {number}")
        self._failures.clear()
        works = [self._tried(self._reflect(branch)) for branch in self._branches(rng)]
        works += [self._tried(merge) for merge in self._selection.merges(rng)]
        found: list[Birth] = []
        for birth in await self._bench.in_parallel(works):
            if birth is None:
                continue
            known = self._state.find(birth.candidate.templates)
            if known is None:
                birth.candidate.round = number
                self._state.add(birth.candidate)
            elif known.version in self._state.beam or any(other.candidate is known for other in found):
                continue
            else:
                birth.candidate = known
            found.append(birth)
        if works and len(self._failures) == len(works):
            raise self._failures[-1]
        return found

    def _branches(self, rng: random.Random) -> list[Branch]:
        """``branch_factor`` of each parent. Templates take turns, over all branches of all rounds."""
        state, branches = self._state, []
        for parent in self._selection.parents(rng):
            names = list(parent.templates)
            for _ in range(self._settings.branch_factor):
                tasks = [(index, self._bench.train[index]) for index in next(self._batches)]
                name = names[state.train_batches % len(names)]
                state.train_batches += 1
                branches.append(Branch(parent, name, tasks, rng.choice(self._critiques), rng.choice(self._edits)))
        return branches

    async def _reflect(self, branch: Branch) -> Birth:
        """Play the parent on training tasks, have that criticised, and the template edited. Raises NoEdit."""
        parent, settings, writer = branch.parent, self._settings, self._bench.writer
        played = [one for one in await self._bench.scorer.play(parent, branch.tasks, "train") if one.reward is not None]
        if not played:
            raise self._bench.scorer.nothing_counts(f"candidate {parent.version}")
        runs = [describe(one, self._adapter, settings) for one in played]
        critique = await writer.critique(branch.critique, parent.templates, branch.name, runs)
        template = await writer.edit(branch.edit, parent.templates, branch.name, critique)
        candidate = Candidate(
            version="",
            templates={**parent.templates, branch.name: template},
            origin="edit",
            parents=(parent.version,),
            changed=(branch.name,),
            critique=critique,
        )
        rewards = {one.index: one.reward for one in played if one.reward is not None}
        return Birth(candidate, branch.tasks, rewards)

    async def _tried(self, work: Awaitable[Birth | None]) -> Birth | None:
        """A child that does not come about is told, and leaves the others alone."""
        try:
            return await work
        except NoEdit as error:
            self._tell(f"a candidate did not come about: {error}")
        except InfrastructureError as error:
            self._failures.append(error)
            self._tell(f"a candidate did not come about: {error}")
        except SpendReached as error:
            if self._state.stopped is None:
                self._state.stopped = f"the optimizing model may cost no more: {error}"
        return None


def shown(score: float | None) -> str:
    """A score for people."""
    return "-" if score is None else f"{score:.3f}"
