"""Which rollouts of a run belong to which of its training steps, and to which group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ray.types import TERMINAL_ROLLOUT, Rollout

CHUNK = 512
"""Rollouts whose spans are held at once, unless a step has more."""


def settled_steps(rollouts: Sequence[Rollout], lines: Sequence[Mapping[str, Any]] | None) -> dict[str, int]:
    """Rollout id -> the step that was settled with it.

    A step's line may name its ``groups``. Without them it is known by the number in its rollouts' metadata, otherwise
    by the weight version they were queued under; one that was played anew after an interruption was settled with the
    rollouts played last.
    """
    named = {group: line["step"] for line in lines or () for group in line.get("groups") or ()}
    waiting: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for rollout in rollouts:
        metadata = rollout.metadata or {}
        if "group_id" in metadata and metadata["group_id"] not in named and rollout.status in TERMINAL_ROLLOUT:
            for key in ("step", "weight_version"):
                if key in metadata:
                    waiting[key, metadata[key]].append(rollout.rollout_id)
                    break
    steps = {r.rollout_id: named[group] for r in rollouts if (group := group_of(r)) in named}
    versions = [0, *(line["weight_version"] for line in lines or ())]
    for line, version in reversed(list(zip(lines or (), versions, strict=False))):
        if line.get("groups"):
            continue
        queue = waiting.get(("step", line["step"])) or waiting.get(("weight_version", version)) or []
        count = line["rollouts"]
        steps.update(dict.fromkeys(queue[-count:], line["step"]))
        del queue[-count:]
    return steps


def parts_of(rollouts: Sequence[Rollout], steps: Mapping[str, int]) -> list[tuple[int | None, list[Rollout]]]:
    """The rollouts in portions to look at: whole steps, and of the others whole groups."""
    by_step: defaultdict[int, list[Rollout]] = defaultdict(list)
    groups: defaultdict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        if (number := steps.get(rollout.rollout_id)) is not None:
            by_step[number].append(rollout)
        else:
            groups[group_of(rollout) or rollout.rollout_id].append(rollout)
    parts: list[tuple[int | None, list[Rollout]]] = [*by_step.items()]
    portion: list[Rollout] = []
    for group in groups.values():
        portion += group
        if len(portion) >= CHUNK:
            parts.append((None, portion))
            portion = []
    return [*parts, (None, portion)] if portion else parts


def group_of(rollout: Rollout) -> str | None:
    """The training group that it was played for."""
    return (rollout.metadata or {}).get("group_id")
