"""The rows of one rollout: trajectories or single calls, within the limits.

Invariant: no row trains a token that another one trains, and a row keeps the mask of the tokens it keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_ray.trajectories.join import Trajectory, Turn
from lightning_ray.trajectories.settings import BatchSettings, Level


@dataclass
class Rows:
    """What is left of a rollout's rows, and what became of the others."""

    kept: list[Trajectory] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows by the reason for which they were left out."""
    truncated: int = 0
    refusal: tuple[str, str] | None = None
    """The reason, and the figures, for which the whole rollout is left out."""


@dataclass(frozen=True)
class Fault:
    """One limit that a row exceeds."""

    reason: str
    choice: str
    figures: str
    end: int
    """Where the row would have to end."""


def at_level(trajectories: Sequence[Trajectory], level: Level) -> list[Trajectory]:
    """The trajectories, or each of their calls on its own: its prompt as context, and what it sampled."""
    if level == "trajectory":
        return list(trajectories)
    rows = [_alone(trajectory, turn) for trajectory in trajectories for turn in trajectory.turns]
    return sorted(rows, key=lambda row: row.turns[0].call)


def _alone(trajectory: Trajectory, turn: Turn) -> Trajectory:
    start, end = turn.start, turn.end
    mask, logprobs = np.zeros(end, np.int8), np.zeros(end, np.float32)
    versions = np.full(end, -1, np.int32)
    mask[start:] = 1
    logprobs[start:] = trajectory.logprobs[start:end]
    versions[start:] = trajectory.weight_versions[start:end]
    return Trajectory(trajectory.token_ids[:end], mask, logprobs, versions, [turn])


def within_limits(rows: Sequence[Trajectory], settings: BatchSettings) -> Rows:
    """Apply the limits to the rows of a rollout that sampled; rows without a sampled token are left out."""
    found = Rows()
    for row in rows:
        if not row.mask.any():
            found.dropped["no_sampled_token"] += 1
            continue
        faults = list(_faults(row, settings))
        refusing = [fault for fault in faults if fault.choice == "drop"]
        leaving_out = [fault for fault in faults if fault.choice == "drop_rows"] or faults
        kept = _cut(row, min(fault.end for fault in faults)) if faults else row
        if refusing:
            found.refusal = found.refusal or (refusing[0].reason, refusing[0].figures)
        elif kept is None or (faults and leaving_out is not faults):
            found.dropped[leaving_out[0].reason] += 1
        else:
            found.kept.append(kept)
            found.truncated += bool(faults)
    if found.refusal is None and not found.kept:
        limits = Counter({reason: count for reason, count in found.dropped.items() if reason != "no_sampled_token"})
        [(reason, count), *_] = (limits or found.dropped).most_common()
        found.refusal = reason, f"{count} of {len(rows)} rows"
    return found


def _faults(row: Trajectory, settings: BatchSettings) -> Iterator[Fault]:
    prompt, length = row.prompt_length, len(row.token_ids)
    for reason, tokens, limit, choice, begin in (
        ("prompt_too_long", prompt, settings.max_prompt_tokens, settings.on_prompt_too_long, 0),
        ("response_too_long", length - prompt, settings.max_response_tokens, settings.on_response_too_long, prompt),
        ("too_long", length, settings.max_tokens, settings.on_too_long, 0),
    ):
        if limit is not None and tokens > limit:
            yield Fault(reason, choice, f"{tokens} tokens, at most {limit}", begin + limit)


def _cut(row: Trajectory, end: int) -> Trajectory | None:
    """The row up to the last sampled token before ``end``; None if there is none."""
    sampled = np.flatnonzero(row.mask[:end])
    if not len(sampled):
        return None
    end = int(sampled[-1]) + 1
    return replace(
        row,
        token_ids=row.token_ids[:end],
        mask=row.mask[:end],
        logprobs=row.logprobs[:end],
        weight_versions=row.weight_versions[:end],
        turns=[turn._replace(end=min(turn.end, end)) for turn in row.turns if turn.start < end],
    )
