"""How many runners there are to be, and where: decided from counts alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_ray.config import RunnerSettings

SHRINK_SECONDS = 10.0
"""How long there must have been too many runners before one goes."""


class Sizing:
    """Grows at once, shrinks by one runner at a time after a while."""

    def __init__(self, settings: RunnerSettings, shrink_seconds: float = SHRINK_SECONDS):
        self._settings = settings
        self._shrink_seconds = shrink_seconds
        self._too_many_since: float | None = None

    def wanted(self, work: int) -> int:
        """Runners for that many rollouts, queued or at work."""
        settings = self._settings
        return max(settings.minimum, min(settings.maximum, math.ceil(work / settings.concurrency)))

    def change(self, present: int, work: int, now: float) -> int:
        """How many runners to add, or -1. ``now`` is in seconds of any clock."""
        wanted = self.wanted(work)
        if wanted >= present:
            self._too_many_since = None
            return wanted - present
        if self._too_many_since is None:
            self._too_many_since = now
        if now - self._too_many_since < self._shrink_seconds:
            return 0
        self._too_many_since = now
        return -1


def crowded_node(runners: Mapping[str, int], nodes: Sequence[str]) -> tuple[str, str] | None:
    """The nodes, of those that can hold runners, with the most and the fewest of them, if that is two more."""
    if len(nodes) < 2:
        return None
    most = max(nodes, key=lambda node: runners.get(node, 0))
    least = min(nodes, key=lambda node: runners.get(node, 0))
    return (most, least) if runners.get(most, 0) - runners.get(least, 0) >= 2 else None
