"""Figures of several policies in one flat row: each policy's are behind its name and a dot, the run's own are not.

``rows_of`` tells them as if a policy were alone, for whatever reads rows of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MARK = "weight_version"
"""The figure that every policy under training has."""
TOTALS = ("sampled_tokens", "sampled_tokens_per_s", "trained_tokens_per_s", "update.trained_tokens")
"""Figures that the run's row has too, summed over the policies."""
SWAP = "swap_ms"
"""The run's is that of the policy whose swap took longest, as they are swapped at the same time."""


def by_policy(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``{"writer": {"rows": 3}}`` -> ``{"writer.rows": 3}``, and the totals."""
    totals = {name: sum(own.get(name, 0) for own in figures.values()) for name in TOTALS}
    totals[SWAP] = max((own[SWAP] for own in figures.values() if own.get(SWAP) is not None), default=None)
    return totals | {f"{policy}.{name}": value for policy, own in figures.items() for name, value in own.items()}


def policies_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The policies that the rows tell of by name; none where there is one alone."""
    ending = f".{MARK}"
    return list(dict.fromkeys(name.removesuffix(ending) for row in rows for name in row if name.endswith(ending)))


def rows_of(rows: Sequence[Mapping[str, Any]], policy: str | None) -> list[dict[str, Any]]:
    """The rows with the figures of one policy without its name, and the run's own; as they are without a policy."""
    if policy is None:
        return [dict(row) for row in rows]
    anyone, begin = tuple(f"{name}." for name in policies_in(rows)), f"{policy}."
    found = []
    for row in rows:
        told = {name: value for name, value in row.items() if not name.startswith(anyone)}
        shared = {name: value for name, value in told.items() if name not in (*TOTALS, SWAP)}
        own = {name.removeprefix(begin): value for name, value in row.items() if name.startswith(begin)}
        found.append({**shared, **own})
    return found
