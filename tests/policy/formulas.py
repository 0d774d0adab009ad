"""Losses of GRPO's family, written from their papers in plain PyTorch, over a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from tests.policy.oracle import token_logprobs


@dataclass
class Row:
    """One trajectory, its trained tokens alone."""

    rollout: str
    new: torch.Tensor
    """Log probabilities under the model, with a gradient."""
    old: torch.Tensor
    """The engine's."""
    reference: torch.Tensor
    """Under the reference model."""

    @property
    def ratio(self) -> torch.Tensor:
        return (self.new - self.old).exp()


Total = Callable[[list[Row], list[torch.Tensor]], torch.Tensor]


def rows_of(table: pa.Table, model: torch.nn.Module, reference: torch.nn.Module | None = None) -> list[Row]:
    rows = []
    for row in table.to_pylist():
        trained = torch.tensor(row["mask"][1:]) == 1
        with torch.no_grad():
            other = token_logprobs(reference or model, row["token_ids"])[trained]
        new, old = token_logprobs(model, row["token_ids"]), torch.tensor(row["logprobs"][1:])
        rows.append(Row(row["rollout_id"], new[trained], old[trained], other))
    return rows


def rewards_and_groups(table: pa.Table) -> tuple[dict[str, float], dict[str, str]]:
    ids = table["rollout_id"].to_pylist()
    rewards = dict(zip(ids, table["reward"].to_pylist(), strict=True))
    return rewards, dict(zip(ids, table["group_id"].to_pylist(), strict=True))


def group_relative(table: pa.Table, by_std: bool) -> dict[str, float]:
    """r - mean of the group, over its standard deviation."""
    rewards, groups = rewards_and_groups(table)
    advantages = {}
    for rollout, reward in rewards.items():
        members = np.array([rewards[other] for other in rewards if groups[other] == groups[rollout]])
        advantages[rollout] = (reward - members.mean()) / (members.std(ddof=1) + 1e-6 if by_std else 1.0)
    return advantages


def leave_one_out(table: pa.Table) -> dict[str, float]:
    """r - mean of the group's other rollouts."""
    rewards, groups = rewards_and_groups(table)
    return {
        rollout: reward
        - np.mean([rewards[other] for other in rewards if groups[other] == groups[rollout] and other != rollout])
        for rollout, reward in rewards.items()
    }


def spread(rows: list[Row], advantage: dict[str, float]) -> list[torch.Tensor]:
    """A rollout's advantage on each of its tokens."""
    return [torch.full_like(row.old, advantage[row.rollout]) for row in rows]


def globally_normalised(table: pa.Table, rows: list[Row], coefficient: float) -> list[torch.Tensor]:
    """REINFORCE++: r less the divergence from a token on, normalised over all tokens of the batch."""
    rewards, _ = rewards_and_groups(table)
    returns: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for rollout, reward in rewards.items():
        left = reward
        for index in reversed([index for index, row in enumerate(rows) if row.rollout == rollout]):
            row = rows[index]
            divergence = (row.new.detach() - row.reference) * coefficient
            returns[index] = left - divergence.flip(0).cumsum(0).flip(0)
            left = left - float(divergence.sum())
    every = torch.cat(returns)
    return [(each - every.mean()) / every.std() for each in returns]


def clipped(low: float, high: float) -> Callable[[Row, torch.Tensor], torch.Tensor]:
    def loss(row: Row, advantage: torch.Tensor) -> torch.Tensor:
        return -torch.minimum(row.ratio * advantage, row.ratio.clamp(1 - low, 1 + high) * advantage)

    return loss


def sequence_clipped(low: float, high: float) -> Callable[[Row, torch.Tensor], torch.Tensor]:
    """GSPO: one ratio for all tokens of a row."""

    def loss(row: Row, advantage: torch.Tensor) -> torch.Tensor:
        ratio = (row.new - row.old).mean().exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)

    return loss


def weight_clipped(low: float, high: float) -> Callable[[Row, torch.Tensor], torch.Tensor]:
    """CISPO."""

    def loss(row: Row, advantage: torch.Tensor) -> torch.Tensor:
        return -row.ratio.clamp(1 - low, 1 + high).detach() * advantage * row.new

    return loss


def log_probability(row: Row, advantage: torch.Tensor) -> torch.Tensor:
    return -advantage * row.new


def soft_gate(positive: float, negative: float) -> Callable[[Row, torch.Tensor], torch.Tensor]:
    """SAPO: 4 / tau sigmoid(tau (ratio - 1)) in place of the ratio."""

    def loss(row: Row, advantage: torch.Tensor) -> torch.Tensor:
        tau = torch.where(advantage > 0, positive, negative)
        return -4 / tau * torch.sigmoid(tau * (row.ratio - 1)) * advantage

    return loss


def k3(row: Row) -> torch.Tensor:
    away = row.reference - row.new
    return away.exp() - away - 1


def mean_over_rollouts(rows: list[Row], losses: list[torch.Tensor]) -> torch.Tensor:
    """Of the mean over each rollout's tokens."""
    rollouts = sorted({row.rollout for row in rows})
    means = [
        torch.cat([loss for row, loss in zip(rows, losses, strict=True) if row.rollout == r]).mean() for r in rollouts
    ]
    return torch.stack(means).mean()


def sum_over_rollouts(rows: list[Row], losses: list[torch.Tensor], horizon: float = 1.0) -> torch.Tensor:
    """The mean over rollouts of the sum over their tokens, over a horizon."""
    return torch.cat(losses).sum() / len({row.rollout for row in rows}) / horizon


def mean_over_tokens(rows: list[Row], losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(losses).mean()
