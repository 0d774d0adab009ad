"""The runner: leases rollouts, plays the agent on many of them at once, and reports each one's end exactly once.

It leases as long as a slot is free and nothing drains it. While attempts are played it beats for all of them, exports
their spans about once a second, and stops those that the store wants stopped. Agents that do not end when they are told
to cost the runner: when too many of its slots are stuck it drains, and returns to be replaced. One attempt's way is
``running.play``'s, and where the agent's model lives is the resources' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from lightning_ray.agent import LitAgent
from lightning_ray.hooks import Hook, HookRunner
from lightning_ray.instrumentation import instrument_clients
from lightning_ray.running.calls import AgentCalls, CallsHere
from lightning_ray.running.failures import infrastructure as infrastructure
from lightning_ray.running.play import Play, Stage
from lightning_ray.running.reports import Reports, UnstorableError
from lightning_ray.running.reports import storable as storable
from lightning_ray.running.resources import ResourceBook
from lightning_ray.running.rest import Rest
from lightning_ray.running.watchdog import Watchdog, exit_now
from lightning_ray.store.base import Store
from lightning_ray.tracing.tracer import OtelTracer, Tracer
from lightning_ray.types import AttemptedRollout

LEASE_WAIT_SECONDS = 5.0
LEASE_AT_ONCE = 16
"""Rollouts leased by one call, or a sixteenth of the slots if that is more: the rest is left to other runners."""
WORTH_A_LEASE = 64
"""A call costs about the same whatever it brings: with fewer slots free than one in so many, more are waited for."""
GATHER_SECONDS = 0.05
"""For how long."""
HEARTBEAT_SECONDS = 2.0
EXPORT_SECONDS = 1.0
STUCK_SHARE = 0.5
"""Of the slots; a runner with that many stuck agents takes no more rollouts."""

logger = logging.getLogger(__name__)


class Runner:
    """Plays ``agent`` on rollouts from ``store``, up to ``concurrency`` at once, until stopped or drained.

    ``calls`` is how the agent is called, in this process by default. ``is_process`` says that this process is the
    runner's own, and may end with it.
    """

    def __init__(
        self,
        agent: LitAgent[Any],
        store: Store,
        worker_id: str,
        secret: bytes,
        concurrency: int = 32,
        *,
        hooks: Sequence[Hook] | Hook | None = None,
        calls: AgentCalls | None = None,
        is_process: bool = False,
    ):
        self.worker_id = worker_id
        self.tracer: Tracer = OtelTracer()
        self.ended = 0
        """Attempts that were played to an end that the store knows."""
        self._agent = agent
        self._store = store
        self._concurrency = concurrency
        self._is_process = is_process
        self._calls = calls or CallsHere(agent)
        self._stage = Stage(
            runner=self,
            agent=agent,
            calls=self._calls,
            resources=ResourceBook(store, secret),
            reports=Reports(store, concurrency),
            hooks=HookRunner(hooks),
        )
        self._playing: dict[tuple[str, str], Play] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._draining: str | None = None
        self._rest = Rest()
        agent.set_runner(self)

    @property
    def playing(self) -> int:
        """How many attempts are being played."""
        return len(self._playing)

    @property
    def _free(self) -> int:
        return self._concurrency - len(self._playing)

    def drain(self, reason: str) -> None:
        """Lease nothing more; ``run`` returns when what is being played has ended."""
        self._draining = self._draining or reason
        self._changed.set()

    async def run(self) -> str:
        """Lease and play until drained; returns the reason. When cancelled, cancels what is being played."""
        instrument_clients()
        watchdog = self._watchdog()
        background = [asyncio.create_task(work) for work in (self._beat(), self._export())]
        try:
            while self._draining is None:
                if self._free:
                    leased = await self._lease()
                    await self._rested()
                    for rollout in leased:
                        self._start(rollout)
                else:
                    await self._change()
            while self._playing:
                await self._change()
            return self._draining
        finally:
            for play in list(self._playing.values()):
                play.stop()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for task in background:
                task.cancel()
            if watchdog is not None:
                watchdog.close()
            await self._calls.close()

    async def _lease(self) -> list[AttemptedRollout]:
        """Rollouts for the free slots, or some of them."""
        if self._free < self._concurrency // WORTH_A_LEASE:
            await asyncio.sleep(GATHER_SECONDS)
            if self._draining is not None:
                return []
        limit = min(self._free, max(LEASE_AT_ONCE, self._concurrency // LEASE_AT_ONCE))
        return await self._store.dequeue_many_rollouts(
            limit=limit, worker_id=self.worker_id, timeout=LEASE_WAIT_SECONDS
        )

    async def _rested(self) -> None:
        """Wait until there is nothing to rest for; at most some seconds."""
        while (seconds := self._rest.seconds) and self._draining is None:
            await self._change(seconds)

    async def _change(self, seconds: float | None = None) -> None:
        """Wait until an attempt has ended, or the runner is drained; at most so long."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _start(self, rollout: AttemptedRollout) -> None:
        play = Play(self._stage, rollout)
        self._playing[play.key] = play
        task = asyncio.create_task(play.run())
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            del self._playing[play.key]
            self._rest.note(play.began, play.failed_by_infrastructure)
            self._tasks.discard(task)
            self.ended += 1
            self._changed.set()
            if not task.cancelled() and (error := task.exception()) is not None:
                # The store takes the attempt back when its lease ends.
                logger.error("the end of attempt %s could not be reported", play.key[1], exc_info=error)

        task.add_done_callback(ended)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                stopped = await self._store.heartbeat(self.worker_id, list(self._playing))
            except Exception:
                logger.exception("heartbeat of runner %s failed", self.worker_id)
                continue
            for key in stopped:
                if play := self._playing.get(key):
                    play.stop()

    async def _export(self) -> None:
        """Send the spans of attempts that go on, and look for agents that are stuck."""
        while True:
            await asyncio.sleep(EXPORT_SECONDS)
            plays = [play for play in self._playing.values() if not play.is_telling]
            taken = [(play, rows) for play in plays if (rows := play.take())]
            try:
                await self._stage.reports.append([row for _, rows in taken for row in rows])
                for play, rows in taken:
                    play.sent(rows)
            except UnstorableError:
                for play in plays:
                    play.drop_unstorable()
            except Exception:
                logger.exception("spans of runner %s could not be stored; they are sent again", self.worker_id)
            stuck = self._calls.stuck() + len(self._stage.stuck)
            if stuck and stuck >= STUCK_SHARE * self._concurrency:
                self.drain(f"{stuck} agents did not end when they were told to, of at most {self._concurrency}")

    def _watchdog(self) -> Watchdog | None:
        if not self._is_process:
            return None
        return Watchdog(self._store, self.worker_id, lambda: list(self._playing.values()), exit_now)
