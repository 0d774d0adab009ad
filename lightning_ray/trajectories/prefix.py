"""Where a conversation's tokens broke: the turn whose prompt does not extend what was seen, and how it differs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_ray.trajectories.join import Chain, ModelCall, nearest

SHOWN = 12
"""Ids shown of either side, from the first that differs."""

Place = Literal["sampled", "context", "first_prompt"]


@dataclass(frozen=True)
class Break:
    """One prompt that should have extended a trajectory and did not."""

    turn: int
    """Of the rollout's answered calls, from 1."""
    common: int
    """Ids that prompt and trajectory have in common at the start."""
    length: int
    """Ids of the trajectory."""
    place: Place
    """What the first id that differs is in the trajectory: sampled by the policy, or a later prompt's; one of the first
    prompt means another conversation."""
    expected: tuple[int, ...]
    """Ids of the trajectory from there on."""
    found: tuple[int, ...]
    """Ids of the prompt from there on."""


def find_breaks(calls: Iterable[ModelCall]) -> list[Break]:
    """The calls that started a trajectory of their own although there was one, in order; joined as ``join_calls``."""
    chains: list[Chain] = []
    breaks = []
    for turn, call in enumerate(calls, 1):
        found = nearest(chains, call)
        if found is not None and found[1] == len(found[0]):
            found[0].append(turn, call)
            continue
        if found is not None:
            breaks.append(_break(turn, call, *found))
        chains.append(Chain(turn, call))
    return breaks


def _break(turn: int, call: ModelCall, chain: Chain, common: int) -> Break:
    trajectory = chain.trajectory()
    mask, end = trajectory.mask, common + SHOWN
    first_sampled = int(mask.argmax()) if mask.any() else len(mask)
    return Break(
        turn,
        common,
        len(mask),
        "first_prompt" if common < first_sampled else "sampled" if mask[common] else "context",
        tuple(trajectory.token_ids[common:end].tolist()),
        tuple(call.prompt_ids[common:end].tolist()),
    )
