"""A weight swap from start to proof, on every replica.

    describe -> (connect, if the replicas changed) -> push, requests in flight frozen -> prove on each

Replicas that restarted or joined since the last swap are found by ``describe`` and taken into the group. Invariant:
``publish`` returns only when every live replica has reproduced the trainer's canary logprobs under the new version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_ray.errors import InfrastructureError, SwapError
from lightning_ray.policy.proof import Proof, canary_prompts, differing_kinds, failure_message

TRIES = 3
"""Pushes until the set of replicas holds still for a whole swap."""

Replicas = Callable[..., Awaitable[list[Any]]]
"""``await replicas(method, *args)`` calls a control method on every live replica."""


class Trainers(Protocol):
    """The trainer ranks: a call on all of them, and its answers in order of rank."""

    async def call(self, method: str, *args: Any, timeout: float) -> list[Any]: ...


@dataclass(frozen=True)
class Swap:
    """What a swap took and showed. Seconds."""

    version: int
    seconds: float
    push_seconds: float
    proofs: list[Proof]

    @property
    def max_logprob_diff(self) -> float:
        """The worst canary difference over the replicas."""
        return max(proof.max_logprob_diff for proof in self.proofs)


class PolicySwapper:
    """Publishes the trainer's weights to the replicas, one version after the other."""

    def __init__(self, replicas: Replicas, trainers: Trainers, tolerance: float, timeout: float):
        self._replicas = replicas
        self._trainers = trainers
        self._tolerance = tolerance
        self._timeout = timeout
        self._connected: set[str] = set()
        self._lock = asyncio.Lock()
        self._canaries: list[list[int]] = []
        self.last: Swap | None = None

    async def publish(self, version: int) -> Swap:
        """Push and prove. Raises SwapError when a replica's proof fails, InfrastructureError past the deadline."""
        async with self._lock:
            try:
                async with asyncio.timeout(TRIES * self._timeout):
                    return await self._publish(version)
            except TimeoutError:
                raise InfrastructureError(
                    f"the swap to version {version} did not end within {TRIES * self._timeout:.0f} s; "
                    "look at the replicas' and trainer ranks' logs in the Ray dashboard"
                ) from None

    async def unproved(self) -> list[str]:
        """Replicas that have no proved weights: fresh ones, until the next ``publish``."""
        if self._lock.locked():
            return []
        members = await self._replicas("describe")
        return [member["replica_id"] for member in members if not member["proved"] and not member["swapping"]]

    async def _publish(self, version: int) -> Swap:
        began = time.perf_counter()
        for remaining in reversed(range(TRIES)):
            try:
                await self._connect()
                [push_seconds, *_] = await self._trainers.call("push", version, timeout=self._timeout)
                break
            except Exception:
                self._connected = set()
                if not remaining:
                    raise
                await asyncio.sleep(1.0)
        expected = (await self._trainers.call("logprobs", self._canaries, timeout=self._timeout))[0]
        proofs = await self._prove(version, [[float(x) for x in row] for row in expected])
        self.last = Swap(version, time.perf_counter() - began, push_seconds, proofs)
        return self.last

    async def _connect(self) -> None:
        members = await self._replicas("describe")
        ids = {member["replica_id"] for member in members}
        if not ids:
            raise InfrastructureError("the policy deployment has no live replica")
        if ids == self._connected:
            return
        offsets, world_size = {}, 1
        for member in members:
            offsets[member["replica_id"]] = world_size
            world_size += member["workers"]
        self._canaries = canary_prompts(min(member["vocabulary"] for member in members))
        await self._trainers.call("connect_engine", offsets, world_size, timeout=self._timeout)
        self._connected = ids

    async def _prove(self, version: int, expected: list[list[float]]) -> list[Proof]:
        answers = await self._replicas("prove", version, self._canaries, expected, self._tolerance)
        proofs = [
            Proof(
                answer["replica_id"],
                version,
                answer["max_logprob_diff"] if answer["version"] == version else float("inf"),
                self._tolerance,
            )
            for answer in answers
        ]
        for proof in proofs:
            if not proof.holds:
                raise SwapError(failure_message(proof, await self._differing(proof.replica_id)))
        return proofs

    async def _differing(self, replica_id: str) -> dict[str, int]:
        trainer = (await self._trainers.call("probes", timeout=self._timeout))[0]
        for answer in await self._replicas("probes"):
            if answer["replica_id"] == replica_id:
                return differing_kinds(trainer, answer["probes"])
        return {}
