"""The object store's way: what is asked of ranks and replicas, and what does not count as a proof."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from lightning_ray.errors import InfrastructureError, TrainersLostError
from lightning_ray.policy.phases import Phases
from lightning_ray.policy.transfer import CHUNK_BYTES, MOST_CHUNKS, ObjectTransfer, transfer_of

MEMBERS = [{"replica_id": "r", "vocabulary": 100, "workers": 1}]


class Ranks:
    """Two ranks; each export is of ``each`` bytes in all."""

    def __init__(self, whole: int, lost: str | None = None):
        self.whole = whole
        self.lost = lost
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def begin(self, method: str, *args: Any) -> list[Any]:
        self.asked.append((method, args))
        return [(method, args, rank) for rank in range(2)]

    async def answers(self, references: Sequence[Any], method: str, timeout: float) -> list[Any]:
        if method == self.lost:
            raise TrainersLostError(f"trainer rank 0 died during {method!r}")
        _, args, _ = references[0]
        return [{"bytes": self.whole // args[1]}, None] if method == "export" else [[[-1.0]], [[-1.0]]]


class Replicas:
    """One replica, which says that it got so many bytes."""

    def __init__(self, got: int, seconds: float = 0.0):
        self.got = got
        self.seconds = seconds
        self.offers: list[dict[str, Any]] = []

    async def __call__(self, method: str, version: int, offer: dict[str, Any], only: Any) -> list[Any]:
        self.offers.append(offer)
        await asyncio.sleep(self.seconds)
        shown = {"replica_id": "r", "version": version, "max_logprob_diff": 0.0, "bytes": self.got}
        return [None, {**shown, "phases": {"apply": 0.0}}]


def transfer(replicas: Any, ranks: Any, name: str = "object", timeout: float = 5.0) -> Any:
    return transfer_of(name, replicas, ranks, 1e-4, timeout)


async def test_the_second_time_chunks_are_asked_for_in_order_before_the_canaries() -> None:
    whole = 3 * CHUNK_BYTES + 5
    ranks, replicas = Ranks(whole), Replicas(whole // 3 * 3)
    way = transfer(replicas, ranks)
    await way.send(1, MEMBERS)
    assert [method for method, _ in ranks.asked] == ["export", "logprobs"] and ranks.asked[0][1] == (0, 1, 0)
    ranks.asked.clear()
    await way.send(2, MEMBERS)
    assert [args for method, args in ranks.asked if method == "export"] == [(n, 3, whole // 3) for n in range(3)]
    assert ranks.asked[-1][0] == "logprobs"
    offer = replicas.offers[-1]
    assert [args for _, args, _ in offer["chunks"]] == [(n, 3, whole // 3) for n in range(3)]
    assert {rank for _, _, rank in offer["chunks"]} == {0} and len(offer["expected"]) == 1


async def test_there_are_not_too_many_chunks_and_an_adapter_is_one() -> None:
    whole = 100 * CHUNK_BYTES
    for name, chunks in (("object", MOST_CHUNKS), ("adapter", 1)):
        ranks = Ranks(whole)
        way = transfer(Replicas(whole), ranks, name)
        await way.send(1, MEMBERS)
        await way.send(2, MEMBERS)
        assert sum(method == "export" for method, _ in ranks.asked) == 1 + chunks


@pytest.mark.parametrize(("got", "difference"), [(1000, 0.0), (999, float("inf")), (1001, float("inf"))])
async def test_a_replica_that_got_other_bytes_proves_nothing(got: int, difference: float) -> None:
    [shown] = await transfer(Replicas(got), Ranks(1000)).send(1, MEMBERS)
    assert shown["max_logprob_diff"] == difference
    assert list(shown["phases"]) == ["call", "apply"] and shown["phases"]["call"] > 0


@pytest.mark.parametrize("method", ["export", "logprobs"])
async def test_a_rank_that_is_lost_is_told_at_once_and_not_the_replicas_trouble(method: str) -> None:
    with pytest.raises(TrainersLostError, match=f"died during '{method}'"):
        await transfer(Replicas(1000, seconds=60.0), Ranks(1000, lost=method)).send(1, MEMBERS)


async def test_a_replica_that_does_not_answer_is_waited_for_no_longer_than_told() -> None:
    with pytest.raises(TimeoutError):
        await transfer(Replicas(1000, seconds=60.0), Ranks(1000), timeout=0.05).send(1, MEMBERS)


def test_a_way_that_there_is_not_is_refused() -> None:
    with pytest.raises(InfrastructureError, match="no weight transfer 'pigeon'; known: object, adapter"):
        transfer(Replicas(0), Ranks(0), "pigeon")
    assert isinstance(transfer(Replicas(0), Ranks(0), "adapter"), ObjectTransfer)


def test_every_moment_belongs_to_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 7.5])
    monkeypatch.setattr("lightning_ray.policy.phases.time.perf_counter", partial(next, now))
    phases = Phases()
    for name in ("fetch", "apply", "fetch", "apply"):
        phases.end(name)
    assert phases.seconds == {"fetch": 1.5, "apply": 6.0}
