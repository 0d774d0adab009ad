"""Ways for the trainer's weights into the replicas; one class each, chosen by ``EngineSettings.transfer``.

    object       one buffer in Ray's object store that every replica loads by itself, in one call: for CPU, and for
                 replicas that come and go; no group of processes has to meet
    adapter      as object, of a LoRA adapter alone
    gloo, nccl   vLLM's own four-phase broadcast from trainer rank 0 to all engine workers
    ipc          likewise, but each engine reads the memory of the trainer rank on its GPU

Each answers with what every replica showed of its canaries; what that proves is the swapper's to say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from lightning_ray.errors import InfrastructureError
from lightning_ray.policy.proof import canary_prompts

Replicas = Callable[..., Awaitable[list[Any]]]
"""``await replicas(method, *args)`` calls a control method on every live replica."""
Member = dict[str, Any]
"""What a replica says of itself: ``Policy.describe``."""
Shown = dict[str, Any]
"""What a replica showed: ``replica_id``, ``version``, ``max_logprob_diff``, and maybe ``bytes``, ``phases`` (seconds of
each part of the swap, in order), and in bfloat16 ``compared`` and ``unlike`` (``policy.bits``)."""
CHUNK_BYTES = 256 * 2**20
"""On two cores smaller ones are not faster: loading then shares both with handing out (benchmarks/RESULTS.md)."""
MOST_CHUNKS = 8


class Trainers(Protocol):
    """The trainer ranks: a call on all of them, and its answers in order of rank."""

    async def call(self, method: str, *args: Any, timeout: float) -> list[Any]: ...

    def begin(self, method: str, *args: Any) -> list[Any]:
        """Call all ranks without waiting; references to their answers."""

    async def answers(self, references: Sequence[Any], method: str, timeout: float) -> list[Any]:
        """What ``call`` returns, of a call that was begun."""


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
    """By the object store, in chunks, so that the replicas load one while the trainer hands out the next. The trainer
    computes the canaries' logprobs while the replicas load.
    """

    by_group = False

    def __init__(
        self,
        replicas: Replicas,
        trainers: Trainers,
        tolerance: float,
        timeout: float,
        most_chunks: int = MOST_CHUNKS,
    ):
        self._replicas = replicas
        self._trainers = trainers
        self._tolerance = tolerance
        self._timeout = timeout
        self.most_chunks = most_chunks
        self._bytes = 0
        """Of the weights, as they were last."""

    async def send(self, version: int, members: Sequence[Member], only: Sequence[str] | None = None) -> list[Shown]:
        """One call for each replica: fetch, freeze, load, go on, prove. Only the replicas wait for the chunks."""
        canaries, began = canaries_of(members), time.perf_counter()
        chunks = max(1, min(self.most_chunks, self._bytes // CHUNK_BYTES))
        size = self._bytes // chunks
        exports = [self._trainers.begin("export", chunk, chunks, size) for chunk in range(chunks)]
        expected = self._trainers.begin("logprobs", canaries)
        offer = {
            "chunks": [references[0] for references in exports],
            "canaries": canaries,
            "expected": expected[:1],
            "tolerance": self._tolerance,
        }
        exporting = asyncio.gather(*(self._trainers.answers(each, "export", self._timeout) for each in exports))
        computing = asyncio.ensure_future(self._trainers.answers(expected, "logprobs", self._timeout))
        swapping = asyncio.ensure_future(self._replicas("swap", version, offer, only))
        tasks = (exporting, computing, swapping)
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in tasks:  # why a rank failed says more than that a replica got nothing from it
                    if task.done():
                        task.result()
                found = [shown for shown in await swapping if shown is not None]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._bytes = sum(chunk[0]["bytes"] for chunk in exporting.result())
        seconds = time.perf_counter() - began
        return [self._told(shown, seconds) for shown in found]

    def forget(self) -> None:
        """Nothing is agreed upon."""

    def _told(self, shown: Shown, seconds: float) -> Shown:
        """What a replica showed; nothing if it did not get all bytes. ``call`` is the way there and back."""
        phases = {"call": seconds - sum(shown["phases"].values()), **shown["phases"]}
        lacking = {} if shown["bytes"] == self._bytes else {"max_logprob_diff": float("inf")}
        return {**shown, "phases": phases, **lacking}


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
        canaries = canaries_of(members)
        bits = (await self._trainers.call("push", version, canaries, timeout=self._timeout))[0]
        expected = (await self._trainers.call("logprobs", canaries, timeout=self._timeout))[0]
        rows = [[float(x) for x in row] for row in expected]
        return await self._replicas("prove", version, canaries, rows, self._tolerance, bits)

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


def transfer_of(backend: str, replicas: Replicas, trainers: Trainers, tolerance: float, timeout: float) -> Transfer:
    """The way of that name."""
    ways: dict[str, Callable[..., Transfer]] = {
        "object": ObjectTransfer,
        "adapter": partial(ObjectTransfer, most_chunks=1),
        "gloo": GroupTransfer,
        "nccl": GroupTransfer,
        "ipc": GroupTransfer,
    }
    if backend not in ways:
        raise InfrastructureError(f"there is no weight transfer {backend!r}; known: {', '.join(ways)}")
    return ways[backend](replicas, trainers, tolerance, timeout)
