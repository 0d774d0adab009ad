"""Ways for the trainer's weights into the replicas; one class each, chosen by ``EngineSettings.transfer``.

    object       one buffer in Ray's object store that every replica loads by itself, in one call: for CPU, and for
                 replicas that come and go; no group of processes has to meet
    adapter      as object, of a LoRA adapter alone
    gloo, nccl   vLLM's own four-phase broadcast from trainer rank 0 to all engine workers

Each answers with what every replica showed of its canaries; what that proves is the swapper's to say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from lightning_ray.errors import InfrastructureError
from lightning_ray.policy.proof import canary_prompts

Replicas = Callable[..., Awaitable[list[Any]]]
"""``await replicas(method, *args)`` calls a control method on every live replica."""
Member = dict[str, Any]
"""What a replica says of itself: ``Policy.describe``."""
Shown = dict[str, Any]
"""What a replica showed: ``replica_id``, ``version``, ``max_logprob_diff``, and maybe ``parameters``, ``bytes`` and
``phases`` (seconds of each part of the swap, in order)."""


class Trainers(Protocol):
    """The trainer ranks: a call on all of them, and its answers in order of rank."""

    async def call(self, method: str, *args: Any, timeout: float) -> list[Any]: ...

    def begin(self, method: str, *args: Any) -> list[Any]:
        """Call all ranks without waiting; references to their answers."""


class Transfer(Protocol):
    """Moves weights."""

    by_group: bool
    """Whether it has to know exactly which replicas there are."""

    async def send(self, version: int, members: Sequence[Member], only: Sequence[str] | None = None) -> list[Shown]:
        """Put the trainer's weights into the members (or ``only`` these) as ``version``; what they show then."""

    def forget(self) -> None:
        """Something went wrong: rely on nothing that was agreed upon before."""


def canaries_of(members: Sequence[Member]) -> list[list[int]]:
    """Prompts that every member has the words for."""
    return canary_prompts(min(member["vocabulary"] for member in members))


class ObjectTransfer:
    """By the object store. The trainer computes the canaries' logprobs while the replicas load."""

    by_group = False

    def __init__(self, replicas: Replicas, trainers: Trainers, tolerance: float, timeout: float):
        self._replicas = replicas
        self._trainers = trainers
        self._tolerance = tolerance
        self._timeout = timeout

    async def send(self, version: int, members: Sequence[Member], only: Sequence[str] | None = None) -> list[Shown]:
        """One call for each replica: fetch, freeze, load, go on, prove."""
        canaries, began = canaries_of(members), time.perf_counter()
        [weights, *_] = await self._trainers.call("export", timeout=self._timeout)
        export = time.perf_counter() - began
        expected = self._trainers.begin("logprobs", canaries)
        offer = {**weights, "canaries": canaries, "expected": expected[:1], "tolerance": self._tolerance}
        swapping = asyncio.ensure_future(self._replicas("swap", version, offer, only))
        computing = asyncio.gather(*(_answer(reference) for reference in expected))
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.wait({swapping, computing}, return_when=asyncio.FIRST_EXCEPTION)
                await computing
                found = [shown for shown in await swapping if shown is not None]
                return [{**shown, "phases": {"export": export, **shown["phases"]}} for shown in found]
        finally:
            swapping.cancel()
            computing.cancel()

    def forget(self) -> None:
        """Nothing is agreed upon."""


class GroupTransfer:
    """By a broadcast in a group of rank 0 and all engine workers, which is formed anew when the replicas change."""

    by_group = True

    def __init__(self, replicas: Replicas, trainers: Trainers, tolerance: float, timeout: float):
        self._replicas = replicas
        self._trainers = trainers
        self._tolerance = tolerance
        self._timeout = timeout
        self._connected: set[str] = set()

    async def send(self, version: int, members: Sequence[Member], only: Sequence[str] | None = None) -> list[Shown]:
        """A broadcast reaches all members, whoever needs it."""
        await self._connect(members)
        await self._trainers.call("push", version, timeout=self._timeout)
        canaries = canaries_of(members)
        expected = (await self._trainers.call("logprobs", canaries, timeout=self._timeout))[0]
        rows = [[float(x) for x in row] for row in expected]
        return await self._replicas("prove", version, canaries, rows, self._tolerance)

    def forget(self) -> None:
        """The group is formed anew."""
        self._connected = set()

    async def _connect(self, members: Sequence[Member]) -> None:
        ids = {member["replica_id"] for member in members}
        if ids == self._connected:
            return
        offsets, world_size = {}, 1
        for member in members:
            offsets[member["replica_id"]] = world_size
            world_size += member["workers"]
        await self._trainers.call("connect_engine", offsets, world_size, timeout=self._timeout)
        self._connected = ids


async def _answer(reference: Any) -> Any:
    return await reference


def transfer_of(backend: str, replicas: Replicas, trainers: Trainers, tolerance: float, timeout: float) -> Transfer:
    """The way of that name."""
    ways: dict[str, Callable[..., Transfer]] = {
        "object": ObjectTransfer,
        "adapter": ObjectTransfer,
        "gloo": GroupTransfer,
        "nccl": GroupTransfer,
    }
    if backend not in ways:
        raise InfrastructureError(f"there is no weight transfer {backend!r}; known: {', '.join(ways)}")
    return ways[backend](replicas, trainers, tolerance, timeout)
