"""A swap that nobody showed anything of is not proved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lightning_ray.errors import InfrastructureError
from lightning_ray.policy.swap import PolicySwapper


class Silent:
    """A transfer whose replicas are gone the first ``times``."""

    by_group = False

    def __init__(self, times: int) -> None:
        self.left = times

    async def send(self, version: int, members: Sequence[Any], only: Sequence[str] | None = None) -> list[Any]:
        self.left -= 1
        return [] if self.left >= 0 else [{"replica_id": "b", "version": version, "max_logprob_diff": 0.0}]

    def forget(self) -> None: ...


def swapper_of(transfer: Silent, monkeypatch: pytest.MonkeyPatch) -> PolicySwapper:
    async def replicas(method: str, *arguments: Any) -> list[Any]:
        return [{"replica_id": "a"}]

    async def at_once(_: float) -> None: ...

    monkeypatch.setattr("lightning_ray.policy.swap.asyncio.sleep", at_once)
    return PolicySwapper(replicas, None, transfer, 1e-4, 5.0)  # type: ignore[arg-type]


async def test_weights_are_sent_again_to_replicas_that_come_up_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = await swapper_of(Silent(1), monkeypatch).publish(3)
    assert [proof.replica_id for proof in swap.proofs] == ["b"] and "no replica answered" in swap.mended[0]


async def test_without_any_replica_nothing_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfrastructureError, match="no replica answered"):
        await swapper_of(Silent(9), monkeypatch).publish(3)
