"""The runner: leases rollouts, plays the agent on many of them at once, and reports each one's end exactly once.

States of one attempt here: leased -> playing -> reported. Whatever the agent does (returns, raises, returns nonsense),
the attempt ends with a status and its spans in one durable write. A rollout that the store wants stopped
(cancelled, timed out) is cancelled at the next heartbeat. Where the agent's model lives is the resources' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lightning_ray.agent import LitAgent
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.emit import emit_exception, emit_reward
from lightning_ray.errors import AgentError, StoreError
from lightning_ray.store.base import Store
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.tracing import AttemptTrace, traced
from lightning_ray.types import AttemptedRollout, NamedResources, ProxyLLM

LEASE_WAIT_SECONDS = 5.0
HEARTBEAT_SECONDS = 2.0
KEY_SECONDS = 6 * 3600.0
"""Life of an attempt's key when its rollout has no timeout."""
SPARE_THREADS = 256
"""Threads beyond ``concurrency`` for agents that are not async: one given up keeps its thread until it returns."""

logger = logging.getLogger(__name__)


class Runner:
    """Plays ``agent`` on rollouts from ``store``, up to ``concurrency`` at once, until stopped."""

    def __init__(self, agent: LitAgent[Any], store: Store, worker_id: str, secret: bytes, concurrency: int = 32):
        self._agent = agent
        self._store = store
        self._worker_id = worker_id
        self._secret = secret
        self._free = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._threads = ThreadPoolExecutor(concurrency + SPARE_THREADS, thread_name_prefix=worker_id)
        self._playing: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._resources: dict[str, NamedResources] = {}

    async def run(self) -> None:
        """Lease and play until cancelled; then cancel what is being played."""
        heart = asyncio.create_task(self._beat())
        try:
            while True:
                await self._free.acquire()
                self._free.release()
                wanted = self._concurrency - len(self._playing)
                leased = await self._store.dequeue_many_rollouts(
                    limit=wanted, worker_id=self._worker_id, timeout=LEASE_WAIT_SECONDS
                )
                for rollout in leased:
                    await self._free.acquire()
                    self._start(rollout)
        finally:
            heart.cancel()
            for task in list(self._playing.values()):
                task.cancel()
            await asyncio.gather(*self._playing.values(), return_exceptions=True)
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, rollout: AttemptedRollout) -> None:
        key = (rollout.rollout_id, rollout.attempt.attempt_id)
        task = asyncio.create_task(self._play(rollout))
        self._playing[key] = task

        def ended(task: asyncio.Task[None]) -> None:
            del self._playing[key]
            self._free.release()
            if not task.cancelled() and (error := task.exception()) is not None:
                # The store takes the attempt back when its lease ends.
                logger.error("the end of attempt %s could not be reported", key[1], exc_info=error)

        task.add_done_callback(ended)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                stopped = await self._store.heartbeat(self._worker_id, list(self._playing))
            except Exception:
                logger.exception("heartbeat of runner %s failed", self._worker_id)
                continue
            for rollout_id, attempt_id in stopped:
                if task := self._playing.get((rollout_id, attempt_id)):
                    task.cancel()

    async def _play(self, rollout: AttemptedRollout) -> None:
        trace = AttemptTrace(rollout.rollout_id, rollout.attempt.attempt_id)
        status, metadata = "succeeded", None
        with traced(trace):
            try:
                resources = await self._resources_of(rollout)
                result = await self._call(rollout, resources)
                if result is not None:
                    self._emit_result(result)
                spans = spans_to_batch(trace.spans)
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and being_cancelled():
                    raise
                status = "failed"
                metadata = {"reason": f"{type(error).__name__}: {error}", **infrastructure(error)}
                emit_exception(error)
                spans = spans_to_batch(storable(trace.spans))
        await self._store.finish_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status, spans, metadata)

    def _emit_result(self, result: Any) -> None:
        try:
            emit_reward(result)
        except (TypeError, ValueError) as error:
            name = getattr(self._agent, "__name__", type(self._agent).__name__)
            raise AgentError(
                f"agent {name!r} returned {type(result).__name__} {result!r:.80}; return a number (the reward) or None"
            ) from error

    async def _call(self, rollout: AttemptedRollout, resources: NamedResources) -> Any:
        kind = "validation_rollout" if rollout.mode in ("val", "test") else "training_rollout"
        arguments = (rollout.input, resources, rollout)
        if self._agent.is_async():
            return await getattr(self._agent, f"{kind}_async")(*arguments)
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, context.run, getattr(self._agent, kind), *arguments)

    async def _resources_of(self, rollout: AttemptedRollout) -> NamedResources:
        """The rollout's resources, each captured endpoint with this attempt's own key."""
        resources_id = rollout.resources_id
        if resources_id is None:
            return {}
        if resources_id not in self._resources:
            update = await self._store.get_resources_by_id(resources_id)
            if update is None:
                raise AgentError(f"rollout {rollout.rollout_id} wants resources {resources_id!r}, which do not exist")
            self._resources[resources_id] = update.resources
        life = rollout.config.timeout_seconds or KEY_SECONDS
        return {
            name: self._own(value, rollout, time.time() + life) if isinstance(value, ProxyLLM) else value
            for name, value in self._resources[resources_id].items()
        }

    def _own(self, llm: ProxyLLM, rollout: AttemptedRollout, expires: float) -> ProxyLLM:
        claims = Claims(rollout.rollout_id, rollout.attempt.attempt_id, expires, llm.sampling_parameters)
        return llm.model_copy(update={"api_key": issue_key(self._secret, claims)})


def being_cancelled() -> bool:
    """Whether the runner cancels this task; otherwise a CancelledError comes from inside the agent."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def storable(spans: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The spans without those whose attributes cannot be stored."""
    kept = []
    for span in spans:
        with contextlib.suppress(StoreError):
            spans_to_batch([span])
            kept.append(span)
    return kept


def infrastructure(error: BaseException) -> Mapping[str, bool]:
    """Whether an exception out of an agent is the system's failure, not its own: its endpoint was gone or broken."""
    import openai

    lost = isinstance(error, openai.APIConnectionError) or (
        isinstance(error, openai.APIStatusError) and error.status_code >= 500
    )
    return {"infrastructure": True} if lost else {}
