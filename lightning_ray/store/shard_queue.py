"""Claiming from the queues of several shards: in turn, without waiting on one of them, and never twice.

Rollouts are claimed only from shards that said they have some, so that an empty or silent shard holds up no one.
FIFO holds within a shard; across shards the turn goes round, so that all drain evenly. A claim that a shard
answers late is kept for the worker's next dequeue; one that is never fetched comes back with its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from lightning_ray.errors import LightningRayError
from lightning_ray.types import AttemptedRollout

PATIENCE_SECONDS = 5.0
"""How long a shard may be silent before the others are gone on with."""

_GRACE_SECONDS = 0.5
"""How long a silent shard is waited for when there is something else to go on with."""

_LOOK_SECONDS = 5.0


class ShardQueue:
    """The queues of ``shards`` shards as one. ``ask(shard, name, *args, timeout=...)`` does a call on one."""

    def __init__(self, ask: Callable[..., Awaitable[Any]], shards: int) -> None:
        self._ask = ask
        self._shards = shards
        self._turn = random.randrange(shards)
        self._ready: set[int] = set()
        """Shards that may have something queued: they said so, or gave all that was last asked of them."""
        self._waiting: defaultdict[str | None, set[asyncio.Future[bool]]] = defaultdict(set)
        """One future for each dequeue under way, by worker; done when the worker is released."""
        self._late: defaultdict[str | None, list[asyncio.Future[list[AttemptedRollout]]]] = defaultdict(list)

    def release(self, worker_id: str) -> None:
        """End the worker's waiting dequeues of this client empty-handed; nobody is to get its late claims."""
        self._late.pop(worker_id, None)
        for released in self._waiting.pop(worker_id, ()):
            released.set_result(True)

    async def claimed(self, worker_id: str | None, request_id: str) -> list[AttemptedRollout]:
        """What a request got when it was sent before; nothing new is claimed, as the limit is 0."""
        asked = {shard: self._claim(shard, 0, worker_id, request_id) for shard in range(self._shards)}
        answers, errors = await patiently(asked, PATIENCE_SECONDS)
        if not answers:
            raise next(iter(errors.values()))
        return [claim for shard in sorted(answers) for claim in answers[shard]]

    async def claim(self, limit: int, worker_id: str | None, request_id: str, timeout: float) -> list[AttemptedRollout]:
        """Lease up to ``limit`` rollouts; with nothing queued wait up to ``timeout`` seconds for one.

        Raises what a shard raised if no other had anything.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        error: Exception | None = None
        asked: set[int] = set()
        claims: list[AttemptedRollout] = []
        released: asyncio.Future[bool] = loop.create_future()
        self._waiting[worker_id].add(released)

        async def take() -> None:
            if released.done():
                return
            self._fetch_late(claims, limit, worker_id)
            await self._claim_ready(claims, limit, worker_id, request_id, asked)

        try:
            await take()
            if len(claims) < limit:
                patience = _GRACE_SECONDS if claims or timeout else PATIENCE_SECONDS
                error = await self._look(worker_id, released, asked, 0.0, patience, _GRACE_SECONDS)
                await take()
            if not claims and worker_id is not None:
                await self._note_empty_handed(worker_id, request_id)
            while not claims and not released.done() and (left := deadline - loop.time()) > 0:
                error = await self._look(worker_id, released, asked, min(left, _LOOK_SECONDS), PATIENCE_SECONDS)
                await take()
        except asyncio.CancelledError:
            self._keep(claims, worker_id)
            raise
        finally:
            self._waiting[worker_id].discard(released)
            if not self._waiting[worker_id]:
                del self._waiting[worker_id]
        if error is not None and not claims:
            raise error
        return claims

    async def _note_empty_handed(self, worker_id: str, request_id: str) -> None:
        """Have one shard know that the worker asked; which one and whether at all is of little weight."""
        with contextlib.suppress(LightningRayError, TimeoutError):
            await asyncio.wait_for(self._claim(self._turn, 0, worker_id, request_id), _GRACE_SECONDS)

    def _fetch_late(self, claims: list[AttemptedRollout], limit: int, worker_id: str | None) -> None:
        """Add the worker's late claims that have come by now."""
        late: list[AttemptedRollout] = []
        for task in self._late.pop(worker_id, []):
            if not task.done():
                self._late[worker_id].append(task)
            elif not task.cancelled() and task.exception() is None:
                late += task.result()
        wanted = limit - len(claims)
        claims += late[:wanted]
        self._keep(late[wanted:], worker_id)

    def _keep(self, claims: list[AttemptedRollout], worker_id: str | None) -> None:
        """Keep claims that nobody took for the worker's next dequeue."""
        if claims:
            kept: asyncio.Future[list[AttemptedRollout]] = asyncio.get_running_loop().create_future()
            kept.set_result(claims)
            self._late[worker_id].append(kept)

    async def _claim_ready(
        self, claims: list[AttemptedRollout], limit: int, worker_id: str | None, request_id: str, asked: set[int]
    ) -> None:
        """Add claims of ready shards, in turn. A shard in ``asked`` would answer with this request's claims
        again.
        """
        self._turn = (self._turn + 1) % self._shards
        for shard in sorted(self._ready - asked, key=lambda shard: (shard - self._turn) % self._shards):
            wanted = limit - len(claims)
            if wanted and shard in self._ready:  # or another dequeue of this client is at it
                self._ready.discard(shard)
                got = await self._claim_in_time(shard, wanted, worker_id, request_id, asked)
                claims += got
                if len(got) == wanted:
                    self._ready.add(shard)

    async def _claim_in_time(
        self, shard: int, wanted: int, worker_id: str | None, request_id: str, asked: set[int]
    ) -> list[AttemptedRollout]:
        """What a shard gives within our patience. One that fails is looked at again, which tells its error."""
        task = asyncio.ensure_future(self._claim(shard, wanted, worker_id, request_id))
        try:
            await asyncio.wait([task], timeout=PATIENCE_SECONDS)
        finally:
            if not task.done():
                self._late[worker_id].append(task)
                asked.add(shard)
        got: list[AttemptedRollout] = task.result() if task.done() and task.exception() is None else []
        if got:
            asked.add(shard)
        return got

    def _claim(
        self, shard: int, limit: int, worker_id: str | None, request_id: str
    ) -> Awaitable[list[AttemptedRollout]]:
        return self._ask(shard, "dequeue_many_rollouts", limit, worker_id, f"{request_id}/{shard}", timeout=0.0)

    async def _look(
        self,
        worker_id: str | None,
        released: asyncio.Future[bool],
        asked: set[int],
        seconds: float,
        patience: float,
        grace: float = 0.0,
    ) -> Exception | None:
        """Wait until a shard has something queued, a late claim has come or the worker is released, at most
        ``seconds``; returns the failure of a shard that could not say, if any.
        """
        calls = {
            shard: self._ask(shard, "wait_for_queue", timeout=seconds)
            for shard in range(self._shards)
            if shard not in asked
        }
        others: list[asyncio.Future[Any]] = [released, *self._late.get(worker_id, [])]
        if not calls:
            await asyncio.wait(others, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return None
        answers, errors = await patiently(calls, seconds + patience, bool, grace, others)
        self._ready |= {shard for shard, queued in answers.items() if queued}
        if errors and not any(answers.values()):
            await asyncio.sleep(min(seconds, 1.0))  # or a shard that fails at once would be asked without end
        return next(iter(errors.values()), None)


async def patiently(
    calls: Mapping[int, Awaitable[Any]],
    seconds: float,
    until: Callable[[Any], bool] = lambda answer: False,
    grace: float = 0.0,
    others: Iterable[asyncio.Future[Any]] = (),
) -> tuple[dict[int, Any], dict[int, Exception]]:
    """Answers and failures by shard, of the calls that end within ``seconds``; the rest is given up.

    Once an answer passes ``until``, or one of the ``others`` is done, only ``grace`` seconds are waited for more.
    Without any of these it goes on until there is an answer, or all have failed.
    """
    loop = asyncio.get_running_loop()
    tasks: dict[asyncio.Future[Any], int] = {asyncio.ensure_future(call): shard for shard, call in calls.items()}
    pending, open_others = set(tasks), set(others)
    answers: dict[int, Any] = {}
    errors: dict[int, Exception] = {}
    end, enough = loop.time() + seconds, False
    try:
        while pending and (loop.time() < end or not (answers or enough)):
            wait = end - loop.time() if answers or enough else None
            done, _ = await asyncio.wait(pending | open_others, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            for task in done & pending:
                error = None if task.cancelled() else task.exception()
                if isinstance(error, Exception):
                    errors[tasks[task]] = error
                elif not task.cancelled():
                    answers[tasks[task]] = task.result()
            if done & open_others or any(map(until, answers.values())):
                end, enough = min(end, loop.time() + grace), True
            pending, open_others = pending - done, open_others - done
    finally:
        for task in pending:
            task.cancel()
    return answers, errors
