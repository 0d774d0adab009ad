"""What a training step leaves in the traces of its rollouts: one small span each, stored as one batch.

    attempt (runner) -> model calls (replicas)
                     -> trained | dropped (the step) --link--> train_step

So the store alone tells of a rollout which steps and versions came of it, and of a step what it was made of: the link
names the step's own span, which is not stored, as those that link to it say all of it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import StoreError
from lightning_ray.semconv import DROPPED_SPAN, TRAINED_SPAN
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.traces.ids import trace_id_of

if TYPE_CHECKING:
    from lightning_ray.algorithms.source import Played, Share
    from lightning_ray.store.base import Store
    from lightning_ray.trajectories.episode import Episode

Row = dict[str, Any]


@dataclass(frozen=True)
class StepTold:
    """A step, as its spans tell it. Times are Unix seconds: of the update and what follows, to the proof."""

    step: int
    versions: Mapping[str, int]
    """By policy, of the weights that came of it."""
    start_time: float
    end_time: float


async def append_training_spans(store: Store, played: Played, told: StepTold) -> None:
    """Store what became of a step's rollouts; those that are not in this store are passed over."""
    rows = list(training_spans(played, told)) if played.own else []
    if rows:
        with contextlib.suppress(StoreError):  # of rollouts that were deleted meanwhile; the others' are stored
            await store.append_spans(spans_to_batch(rows), synced=False)


def training_spans(played: Played, told: StepTold) -> Iterator[Row]:
    """A row for each rollout and policy."""
    for policy, share in played.shares.items():
        step = {"trace_id": secrets.token_hex(16), "span_id": secrets.token_hex(8)}
        for name, episode, attributes in _told(share):
            if episode.attempt_id is None:
                continue
            yield {
                "rollout_id": episode.rollout_id,
                "attempt_id": episode.attempt_id,
                "sequence_id": 0,
                "trace_id": trace_id_of(episode.rollout_id, episode.attempt_id),
                "span_id": secrets.token_hex(8),
                "parent_id": None,
                "name": name,
                "start_time": told.start_time,
                "end_time": told.end_time,
                "status": "OK",
                "attributes": {
                    "lightning_ray.step": told.step,
                    "lightning_ray.policy": policy,
                    "lightning_ray.version": told.versions[policy],
                    **attributes,
                },
                "links": [{"context": step}],
            }


def _told(share: Share) -> Iterator[tuple[str, Episode, dict[str, Any]]]:
    for episode in share.account.trained:
        tokens = sum(int(trajectory.mask.sum()) for trajectory in episode.trajectories)
        attributes = {"reward": episode.reward, "tokens": tokens, "rows": len(episode.trajectories)}
        yield TRAINED_SPAN, episode, {f"lightning_ray.{key}": value for key, value in attributes.items()}
    by_id = {episode.rollout_id: episode for episode in share.episodes}
    for rollout_id, reason in share.account.dropped.items():
        if rollout_id in by_id:
            yield DROPPED_SPAN, by_id[rollout_id], {"lightning_ray.reason": reason}
