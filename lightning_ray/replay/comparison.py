"""Figures of a step beside each other: as the run recorded them, as replayed, and with other settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

TIMES = frozenset({"seconds"})
"""What the run recorded of the clock."""


@dataclass(frozen=True)
class Line:
    """One figure; None where there is no such. ``difference`` is to the column before: of the replay to the record, or
    with other settings, of those to the replay.
    """

    name: str
    recorded: float | None
    replayed: float | None
    changed: float | None
    difference: float | None


def compare(
    recorded: Mapping[str, float], replayed: Mapping[str, float], changed: Mapping[str, float] | None = None
) -> list[Line]:
    """All figures, in the run's order."""
    names = dict.fromkeys((*recorded, *replayed, *(changed or ())))
    lines = []
    for name in names:
        if name not in TIMES:
            told, again, other = recorded.get(name), replayed.get(name), (changed or {}).get(name)
            pair = (told, again) if changed is None else (again, other)
            difference = None if None in pair else pair[1] - pair[0]  # type: ignore[operator]
            lines.append(Line(name, told, again, other, difference))
    return lines


def differing(recorded: Mapping[str, float], replayed: Mapping[str, float], tolerance: float) -> list[str]:
    """Names of the figures that both have and that are further apart than ``tolerance``, of a figure above 1 in
    proportion to it.
    """
    return [
        name
        for name, told in recorded.items()
        if name in replayed and not _close(told, replayed[name], tolerance * max(1.0, abs(told)))
    ]


def _close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance or (math.isnan(one) and math.isnan(other))


def tolerance_for(same_order: bool, dtype: str) -> float:
    """How far a replay may be from a run's figures, for rounding alone.

    It is almost nothing where sums are in the same order, as they are on one rank of a CPU; among several ranks and in
    the kernels of a GPU they are not.
    """
    if dtype != "float32":
        return 1e-2
    return 1e-6 if same_order else 1e-4
