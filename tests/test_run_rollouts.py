"""Waiting for a run's rollouts: it is broken off when what they need to end is lost, and told by who notices."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lightning_ray.errors import TrainersLostError
from lightning_ray.run import trained_policy
from lightning_ray.run.rollouts import RunRollouts
from lightning_ray.run.state import PolicyState
from lightning_ray.run.trained_policy import TrainedPolicy
from lightning_ray.store import LocalStoreClient, SpanStore
from lightning_ray.types import EnqueueRolloutRequest


async def test_waits_are_broken_off_while_what_rollouts_need_is_lost(tmp_path: Any) -> None:
    store = LocalStoreClient(SpanStore(tmp_path))
    rollouts = RunRollouts(store, asyncio.get_running_loop().create_future(), 60.0, 1)
    [queued] = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=1)])
    waits = [asyncio.create_task(rollouts.wait_for([queued.rollout_id])) for _ in range(2)]
    await asyncio.sleep(0.05)
    for text in ("rank 0 died", "rank 0 died again"):
        rollouts.interrupt(TrainersLostError(text))
    for wait in (*waits, asyncio.create_task(rollouts.wait_for([queued.rollout_id]))):
        with pytest.raises(TrainersLostError, match=r"rank 0 died$"):
            await wait
    rollouts.resume()
    again = asyncio.create_task(rollouts.wait_for([queued.rollout_id]))
    await store.update_rollout(queued.rollout_id, status="succeeded")
    await asyncio.wait_for(again, 10)
    await store.close()


class Ranks:
    """Trainer ranks, as far as the watch looks at them."""

    def __init__(self, ranks: list[str]):
        self.ranks = ranks


class Swapper:
    """A fresh replica is there, and the ranks are lost."""

    def __init__(self, error: TrainersLostError):
        self.error = error
        self.calls = 0

    async def unproved(self) -> list[str]:
        return ["fresh"]

    async def publish(self, version: int) -> None:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize(
    ("silent", "ranks", "told"), [(False, ["one"], True), (True, ["one"], False), (False, [], False)]
)
async def test_a_fresh_replica_that_dead_ranks_cannot_serve_breaks_off_the_waits(
    monkeypatch: pytest.MonkeyPatch, silent: bool, ranks: list[str], told: bool
) -> None:
    """All replicas may be fresh: no rollout ends then, and nobody else would call the ranks."""
    monkeypatch.setattr(trained_policy, "WATCH_SECONDS", 0.01)
    lost: list[TrainersLostError] = []
    notes: list[str] = []
    policy = TrainedPolicy(None, None, PolicyState(), notes.append, lost=lost.append)  # type: ignore[arg-type]
    policy.trainers, policy.swapper = Ranks(ranks), Swapper(TrainersLostError("rank 0 died", silent))  # type: ignore[assignment]
    policy.watch()
    while policy.swapper.calls < 2:  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)
    policy.close()
    assert bool(lost) == told
    assert any("failed: rank 0 died" in note for note in notes) == silent
