"""The account of each training step by groups: which taught, which did not, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TRAINED = "trained"


class Verdict(Protocol):
    """What is known of a rollout: its step and group, and what became of it."""

    @property
    def step(self) -> int | None: ...

    @property
    def group_id(self) -> str | None: ...

    @property
    def reason(self) -> str: ...


@dataclass(frozen=True)
class StepAccount:
    """What became of the rollouts of one step."""

    step: int
    version: int | None
    """Of the weights that it trained, where the run recorded it."""
    groups: Mapping[str, Mapping[str, int]]
    """Group id -> rollouts by reason, ``trained`` among them; in the order in which they were settled."""

    @property
    def counts(self) -> Counter[str]:
        """Rollouts by reason."""
        return sum((Counter(group) for group in self.groups.values()), Counter())

    @property
    def dropped(self) -> dict[str, int]:
        """Rollouts that were not trained on, by reason, most first."""
        return {reason: count for reason, count in self.counts.most_common() if reason != TRAINED}

    @property
    def taught(self) -> int:
        """Groups of which a rollout was trained on."""
        return sum(TRAINED in group for group in self.groups.values())


def step_accounts(verdicts: Iterable[Verdict], lines: Sequence[Mapping[str, Any]]) -> list[StepAccount]:
    """Of each step that has a verdict, in order. ``lines`` are those of the steps that were settled."""
    steps: defaultdict[int, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for verdict in verdicts:
        if verdict.step is not None:
            steps[verdict.step][str(verdict.group_id)][verdict.reason] += 1
    told = {line["step"]: line for line in lines}
    accounts = []
    for step, groups in sorted(steps.items()):
        order = [*told[step].get("groups", ()), *groups]
        settled = {group: dict(groups[group]) for group in dict.fromkeys(order) if group in groups}
        accounts.append(StepAccount(step, told[step].get("version"), settled))
    return accounts
