"""A weight swap from start to proof, on every replica.

    describe -> send, requests in flight frozen -> each replica shows its canaries' logprobs -> proved
                                                -> not equal: send again in full -> restart it, send again -> SwapError

Replicas that restarted or joined since the last swap are found by ``describe``. A replica that is not proved answers
nobody. Invariant: ``publish`` returns only when every live replica has reproduced the trainer's canary logprobs under
the new version; by the object store, also has loaded as many bytes as the trainer sent; in bfloat16, also holds the
same bits, where whole weights lie in one worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_ray.errors import InfrastructureError, SwapError, TrainersLostError
from lightning_ray.policy.proof import COARSE_PROBE_TOLERANCE, PROBE_TOLERANCE, Proof, differing_kinds, failure_message
from lightning_ray.policy.transfer import Member, Replicas, Shown, Trainers, Transfer
from lightning_ray.waiting import waiting

TRIES = 3
"""Sendings until the set of replicas holds still for a whole swap."""


@dataclass(frozen=True)
class Swap:
    """What a swap took and showed. Seconds."""

    version: int
    seconds: float
    proofs: list[Proof]
    mended: list[str] = field(default_factory=list)
    """What was done about replicas that could not prove it at first."""
    bytes: int | None = None
    """Of the weights, where the replicas tell."""
    compared: float | None = None
    """Share of the weights whose bits were compared, where they are."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each part, of the replica that loaded longest, where they tell: ``apply`` loads the weights from the
    replica's own memory.
    """

    @property
    def max_logprob_diff(self) -> float:
        """The worst canary difference over the replicas."""
        return max(proof.max_logprob_diff for proof in self.proofs)


class PolicySwapper:
    """Publishes the trainer's weights to the replicas, one version after the other."""

    def __init__(
        self,
        replicas: Replicas,
        trainers: Trainers,
        transfer: Transfer,
        tolerance: float,
        timeout: float,
        restart_timeout: float = 180.0,
        coarse: bool = False,
    ):
        self._replicas = replicas
        self._trainers = trainers
        self.transfer = transfer
        self._tolerance = tolerance
        self._timeout = timeout
        self._restart_timeout = restart_timeout
        self._probe_tolerance = COARSE_PROBE_TOLERANCE if coarse else PROBE_TOLERANCE
        """``coarse`` says that the engine computes in bfloat16."""
        self._lock = asyncio.Lock()
        self._known: list[Member] = []
        """The replicas, as they were when they were last asked."""
        self.last: Swap | None = None
        self.present: frozenset[str] = frozenset()
        """Replicas that answered when ``unproved`` last asked."""

    async def publish(self, version: int) -> Swap:
        """Send and prove. Raises SwapError when a replica cannot prove it whatever is done, TrainersLostError when a
        rank died meanwhile, InfrastructureError past the deadline.
        """
        deadline = TRIES * self._timeout + self._restart_timeout
        async with self._lock:
            try:
                async with asyncio.timeout(deadline):
                    with waiting(f"the swap to version {version}"):
                        self.last = await self._publish(version)
                    return self.last
            except TimeoutError:
                raise InfrastructureError(
                    f"the swap to version {version} did not end within {deadline:.0f} s; "
                    "the run's events.jsonl tells what replicas and trainer ranks were at, and who died"
                ) from None

    async def unproved(self) -> list[str]:
        """Replicas that have no proved weights: fresh ones, until the next ``publish``."""
        if self._lock.locked():
            return []
        members = await self._replicas("describe")
        self.present = frozenset(member["replica_id"] for member in members)
        return [member["replica_id"] for member in members if not member["proved"] and not member["swapping"]]

    async def _publish(self, version: int) -> Swap:
        began, mended = time.perf_counter(), list[str]()
        shown = await self._send(version, None, mended)
        failed = [proof for proof in self._proofs(version, shown) if not proof.holds]
        if failed:
            mended.append(f"{_names(failed)} did not prove version {version} and got the weights again")
            shown = _latest(shown, await self._send(version, [proof.replica_id for proof in failed], mended))
            failed = [proof for proof in self._proofs(version, shown) if not proof.holds]
        if failed:
            reason = failure_message(failed[0], await self._differing(failed[0].replica_id))
            mended.append(f"{_names(failed)} did not prove version {version} again and was restarted")
            await self._restart([proof.replica_id for proof in failed])
            shown = await self._send(version, None, mended)
            if any(not proof.holds for proof in self._proofs(version, shown)):
                raise SwapError(reason)
        seconds = time.perf_counter() - began
        size = next((answer["bytes"] for answer in shown if "bytes" in answer), None)
        told = [answer["phases"] for answer in shown if "phases" in answer]
        phases: dict[str, float] = max(told, key=lambda each: each["apply"], default={})
        compared = min((answer["compared"] for answer in shown if "compared" in answer), default=None)
        return Swap(version, seconds, self._proofs(version, shown), mended, size, compared, phases)

    async def _send(self, version: int, only: Sequence[str] | None, mended: list[str]) -> list[Shown]:
        """To replicas that may come and go meanwhile."""
        for remaining in reversed(range(TRIES)):
            try:
                if self.transfer.by_group or not self._known:
                    self._known = await self._members()
                shown = await self.transfer.send(version, self._known, only)
                if not shown and only is None:
                    raise InfrastructureError("no replica answered: all were gone, and none came up in time")
                return shown
            except TrainersLostError:
                raise
            except Exception as error:
                self.transfer.forget()
                self._known = []
                if not remaining:
                    raise
                mended.append(f"version {version} was sent again: {_first_line(error)}")
                await asyncio.sleep(1.0)
        raise AssertionError

    async def _members(self) -> list[Member]:
        members = await self._replicas("describe")
        if not members:
            raise InfrastructureError("the policy deployment has no live replica")
        return members

    def _proofs(self, version: int, shown: Sequence[Shown]) -> list[Proof]:
        return [
            Proof(
                answer["replica_id"],
                version,
                answer["max_logprob_diff"] if answer["version"] == version else float("inf"),
                self._tolerance,
                answer.get("unlike", {}),
            )
            for answer in shown
        ]

    async def _restart(self, replica_ids: Sequence[str]) -> None:
        """Have Serve replace replicas, and wait until there are as many again."""
        before = len(await self._members())
        await self._replicas("give_up", list(replica_ids))
        began = time.monotonic()
        while time.monotonic() - began < self._restart_timeout:
            await asyncio.sleep(1.0)
            try:
                members = await self._members()
            except Exception:  # while all are being replaced there is none to answer
                continue
            known = {member["replica_id"] for member in members}
            if len(members) >= before and not known & set(replica_ids):
                return
        raise InfrastructureError(
            f"replicas {', '.join(replica_ids)} were to be restarted and are not back after "
            f"{self._restart_timeout:.0f} s; look at the controller's log in Ray's session folder"
        )

    async def _differing(self, replica_id: str) -> dict[str, int]:
        trainer = (await self._trainers.call("probes", timeout=self._timeout))[0]
        for answer in await self._replicas("probes"):
            if answer["replica_id"] == replica_id:
                return differing_kinds(trainer, answer["probes"], self._probe_tolerance)
        return {}


def _names(proofs: Sequence[Proof]) -> str:
    return "replica " + ", ".join(f"{proof.replica_id} ({proof.off})" for proof in proofs)


def _first_line(error: BaseException) -> str:
    """What went wrong, without the stack of the process in which it did."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"[:300]


def _latest(before: Sequence[Shown], after: Sequence[Shown]) -> list[Shown]:
    """Each replica's last answer."""
    return list({answer["replica_id"]: answer for answer in (*before, *after)}.values())
