"""Where the rollouts of a step come from: the seam between the loop and what plays, or reads what was played."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from lightning_ray.run.state import ONLY
from lightning_ray.trajectories.account import Account, batch_of
from lightning_ray.trajectories.episode import Episode


@dataclass
class Share:
    """What one of several policies has of a step: its own calls and reward of each rollout, and what became of them."""

    episodes: list[Episode] = field(default_factory=list)
    account: Account = field(default_factory=Account)


@dataclass
class Played:
    """The rollouts of one step, and what became of them."""

    episodes: list[Episode] = field(default_factory=list)
    group_of: dict[str, str] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    own: bool = True
    """Whether this run's weights sampled them, so that the versions of their tokens are this run's."""
    several: dict[str, Share] = field(default_factory=dict)
    """By policy, where there are several; ``episodes`` are the first's then, and ``account`` is nobody's."""

    @property
    def shares(self) -> dict[str, Share]:
        """By policy, of the only one too."""
        return self.several or {ONLY: Share(self.episodes, self.account)}

    def batch(self, policy: str = ONLY) -> pa.Table:
        """The rows that a policy is trained on."""
        table = batch_of(self.shares[policy].account.trained, self.group_of)
        return table if self.own else table.drop_columns(["weight_versions"])

    def record(self, step: int, versions: Mapping[str, int]) -> dict[str, Any]:
        """The line of steps.jsonl: what the step settled, in its order, under the weights of these versions; by policy
        where there are several.
        """
        groups: dict[str, list[str]] = {}
        for rollout_id, group_id in self.group_of.items():
            groups.setdefault(group_id, []).append(rollout_id)
        trained = {name: len(share.account.trained) for name, share in self.shares.items()}
        if self.several:
            return {"step": step, "versions": dict(versions), "groups": list(groups.items()), "trained": trained}
        line = {"step": step, "version": versions[ONLY], "groups": list(groups.items()), "trained": trained[ONLY]}
        # A filter of the user's own is known by nothing but what it did.
        filtered = [rollout_id for rollout_id, reason in self.account.dropped.items() if reason == "filtered_out"]
        return line | ({"filtered": filtered} if filtered else {})


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
