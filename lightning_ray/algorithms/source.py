"""Where the rollouts of a step come from: the seam between the loop and what plays, or reads what was played."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from lightning_ray.trajectories.account import Account, batch_of
from lightning_ray.trajectories.episode import Episode


@dataclass
class Played:
    """The rollouts of one step, and what became of them."""

    episodes: list[Episode] = field(default_factory=list)
    group_of: dict[str, str] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    own: bool = True
    """Whether this run's weights sampled them, so that the versions of their tokens are this run's."""

    def batch(self) -> pa.Table:
        """The rows that are trained on."""
        table = batch_of(self.account.trained, self.group_of)
        return table if self.own else table.drop_columns(["weight_versions"])

    def record(self, step: int, version: int) -> dict[str, Any]:
        """The line of steps.jsonl: what the step settled, in its order, under the weights of ``version``."""
        groups: dict[str, list[str]] = {}
        for rollout_id, group_id in self.group_of.items():
            groups.setdefault(group_id, []).append(rollout_id)
        trained = len(self.account.trained)
        return {"step": step, "version": version, "groups": list(groups.items()), "trained": trained}


class Source(Protocol):
    """Rollouts, step by step."""

    async def begin(self, keep: bool = True) -> None:
        """Be ready for the step after the run's state; what a checkpoint has on its way is kept, or not."""

    async def collect(self, step: int) -> Played:
        """The step's rollouts, settled."""

    def release(self, played: Played) -> None:
        """The step was trained, or there was nothing to train."""

    async def state(self) -> dict[str, Any]:
        """What a resume needs."""

    async def stop(self) -> None:
        """Give up what is on its way."""
