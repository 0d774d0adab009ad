"""Candidates: sets of prompt templates, where they come from, and what they were rewarded with on validation tasks.

A candidate holds every template of the run and differs from its parent in one of them, so that a change of the score
is that template's doing. It plays a validation task once: its reward there is known from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from lightning_ray.types import PromptTemplate


class Candidate(BaseModel):
    """One set of templates."""

    version: str
    """``v0`` is the seed; also the id of its resources in the store."""
    templates: dict[str, PromptTemplate]
    round: int = 0
    """In which it was made; 0 for the seed."""
    origin: Literal["seed", "edit", "merge"] = "seed"
    parents: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    """The templates that differ from the first parent's."""
    critique: str | None = None
    rewards: dict[int, float] = Field(default_factory=dict)
    """By the index of the validation task."""
    unfinished: set[int] = Field(default_factory=set)
    """Validation tasks that took longer than their time: they are not tried again."""
    score: float | None = None
    """Of the last comparison: the mean over tasks that all had a reward for."""
    trial: tuple[float, float] | None = None
    """Mean rewards of parent and candidate on the training tasks of the critique, where they were compared."""

    def mean(self, tasks: Iterable[int]) -> float | None:
        """The mean reward over those of the tasks that it has one for; None if there are none."""
        known = [self.rewards[task] for task in tasks if task in self.rewards]
        return sum(known) / len(known) if known else None

    def same_templates(self, templates: Mapping[str, PromptTemplate]) -> bool:
        """Whether these are its templates."""
        return self.templates == dict(templates)


def in_common(candidates: Sequence[Candidate], tasks: Iterable[int]) -> list[int]:
    """The tasks for which all of them have a reward: only over these can they be compared."""
    return [task for task in tasks if all(task in candidate.rewards for candidate in candidates)]


def ancestors(pool: Mapping[str, Candidate], version: str) -> set[str]:
    """The versions that a candidate descends from, its own included."""
    found: set[str] = set()
    line = [version]
    while line:
        if (one := line.pop()) not in found:
            found.add(one)
            line.extend(pool[one].parents)
    return found


def common_ancestor(pool: Mapping[str, Candidate], one: str, other: str) -> str | None:
    """The youngest candidate that both descend from; None if one descends from the other."""
    ones, others = ancestors(pool, one), ancestors(pool, other)
    if one in others or other in ones:
        return None
    return max(ones & others, key=number, default=None)


def number(version: str) -> int:
    """``v12`` -> 12."""
    return int(version[1:])
