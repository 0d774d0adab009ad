"""The store's actor beyond the contract: what kill -9 leaves, pickled clients, and how its absence is told."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.errors import InfrastructureError
from lightning_ray.store import StoreClient, open_folder
from lightning_ray.types import EnqueueRolloutRequest
from tests.test_store_contract import finish, pair, spans

pytest_plugins = "tests.store_stores"


async def test_the_client_can_be_pickled(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    @cluster.remote
    def count(client: StoreClient) -> int:
        return asyncio.run(client.statistics())["rollouts"]

    actor = start(tmp_path, "pickled")
    client = StoreClient(actor)
    assert await count.remote(client) == (await client.statistics())["rollouts"]
    assert isinstance(pickle.loads(cluster.cloudpickle.dumps(client)), StoreClient)
    cluster.kill(actor)


async def test_calls_made_at_once_have_their_own_answers(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    actor = start(tmp_path, "bundled")
    store = StoreClient(actor)
    calls = [store.enqueue_rollout(number) for number in range(200)]
    bad = [store.query_attempts(f"ro-ghost-{number}") for number in range(10)]
    *queued, _ = await asyncio.gather(*calls, store.statistics())
    assert [rollout.input for rollout in queued] == list(range(200))
    refused = await asyncio.gather(*bad, return_exceptions=True)
    assert [f"ro-ghost-{number}" in str(error) for number, error in enumerate(refused)] == [True] * 10
    given_up = asyncio.create_task(store.enqueue_rollout("given up"))
    wanted = asyncio.create_task(store.enqueue_rollout("wanted"))
    await asyncio.sleep(0)
    given_up.cancel()
    assert (await wanted).input == "wanted"
    cluster.kill(actor)


async def test_kill_9_under_load_loses_nothing_acknowledged(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    actor = start(tmp_path, "killed")
    store, acknowledged, stop = StoreClient(actor, deadline=60.0), {}, asyncio.Event()
    finished: asyncio.Queue[str] = asyncio.Queue()
    numbers: dict[str, list[int]] = {}

    async def work(worker_id: str) -> None:
        while not stop.is_set():
            await store.enqueue_many_rollouts([EnqueueRolloutRequest(input={"by": worker_id})])
            for claim in await store.dequeue_many_rollouts(limit=1, worker_id=worker_id, timeout=1.0):
                numbers[claim.rollout_id] = [await store.get_next_span_sequence_id(*pair(claim)) for _ in range(3)]
                await store.append_spans(spans(claim, 4))
                await store.append_spans(spans(claim, 4, first=4), synced=False)
                await finish(store, claim, spans=spans(claim, 1, first=8))
                assert claim.rollout_id not in acknowledged
                acknowledged[claim.rollout_id] = claim.attempt.attempt_id
                finished.put_nowait(claim.rollout_id)

    workers = [asyncio.create_task(work(f"w{n}")) for n in range(8)]
    for kill in (True, True, False):
        for _ in range(30):
            await asyncio.wait_for(finished.get(), 30.0)
        if kill:
            os.kill(await actor.process_id.remote(), signal.SIGKILL)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*workers), 60.0)
    await actor.close.remote()
    cluster.kill(actor)

    view = open_folder(tmp_path)
    assert {rollout.rollout_id for rollout in view.query_rollouts({"status_in": ["succeeded"]})} == acknowledged.keys()
    for rollout_id, attempt_id in acknowledged.items():
        assert [attempt.attempt_id for attempt in view.query_attempts(rollout_id)] == [attempt_id]
        found = view.scan_spans([rollout_id])
        assert found["span_id"].to_pylist() == [f"s{number}" for number in range(9)]
        assert len({*found["sequence_id"].to_pylist(), *numbers[rollout_id]}) == 12


async def test_an_actor_that_is_gone_is_named_at_the_deadline(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    actor = start(tmp_path, "gone")
    store = StoreClient(actor, deadline=1.0)
    await StoreClient(actor).statistics()
    cluster.kill(actor)
    with pytest.raises(InfrastructureError, match="statistics"):
        for _ in range(100):
            await store.statistics()
            await asyncio.sleep(0.05)


async def test_an_actor_that_hangs_is_named_at_the_deadline_and_answers_later(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    actor = start(tmp_path, "hangs")
    store = StoreClient(actor)
    await store.statistics()
    process_id = await actor.process_id.remote()
    os.kill(process_id, signal.SIGSTOP)
    try:
        with pytest.raises(InfrastructureError, match=r"enqueue_many_rollouts \(deadline 0.5 s\)"):
            await StoreClient(actor, deadline=0.5).enqueue_rollout(1)
        waiting = asyncio.create_task(store.enqueue_rollout(2))
        await asyncio.sleep(0.2)
    finally:
        os.kill(process_id, signal.SIGCONT)
    assert (await asyncio.wait_for(waiting, 30.0)).input == 2
    cluster.kill(actor)


async def test_an_actor_that_cannot_start_says_why(cluster: Any, tmp_path: Path) -> None:
    from actors.span_store import start

    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "00000001.log").write_bytes(b"not a log")
    (tmp_path / "log" / "00000002.log").write_bytes(b"")
    with pytest.raises(InfrastructureError, match="damaged"):
        await asyncio.wait_for(StoreClient(start(tmp_path, "damaged")).statistics(), 60.0)
