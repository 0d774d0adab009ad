"""A runner at work on a real store in this process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.runner import Runner
from lightning_ray.store import LocalStoreClient, SpanStore, read_spans
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import ProxyLLM, Span

SECRET = b"s" * 32
ENDPOINT = ProxyLLM(endpoint="http://host:1/v1", model="policy", sampling_parameters={"temperature": 1.0})
both = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])


class Counting(LocalStoreClient):
    """Counts calls by name, and refuses some."""

    def __init__(self, store: SpanStore):
        super().__init__(store)
        self.counts: dict[str, int] = {}
        self.refused: dict[str, Exception] = {}

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self.refused:
            raise self.refused[name]
        return await super()._call(name, *args, timeout=timeout)


@contextlib.asynccontextmanager
async def playing(store: Any, agent: Any, concurrency: int = 8, **options: Any) -> AsyncIterator[Runner]:
    runner = Runner(agent, store, "w-1", SECRET, concurrency, **options)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def play(
    store: Any, agent: Any, *requests: Request, concurrency: int = 8, timeout: float = 10.0
) -> list[lr.Rollout]:
    """Play the requests to their end; fails if one does not end."""
    queued = await store.enqueue_many_rollouts(requests or [Request(input={})])
    async with playing(store, agent, concurrency):
        return await ended(store, *queued, timeout=timeout)


async def ended(store: Any, *rollouts: Any, timeout: float = 10.0) -> list[Any]:
    ids = [rollout.rollout_id for rollout in rollouts]
    assert len(await store.wait_for_rollouts(rollout_ids=ids, timeout=timeout)) == len(ids)
    return (await store.query_rollouts(rollout_id_in=ids)).items


async def spans_of(store: Any, rollout: Any) -> list[Span]:
    return read_spans(await store.scan_spans([rollout.rollout_id]))


async def rewards_of(store: Any, rollout: lr.Rollout) -> list[Any]:
    found = [span.attributes.get("agentlightning.reward.0.value") for span in await spans_of(store, rollout)]
    return [value for value in found if value is not None]


def agent_of(play_one: Callable[[], Any], is_async: bool) -> Any:
    if is_async:

        async def agent(task: Any, llm: lr.LLM) -> Any:
            await asyncio.sleep(0)
            return play_one()

        return lr.rollout(agent)

    def sync_agent(task: Any, llm: lr.LLM) -> Any:
        return play_one()

    return lr.rollout(sync_agent)


async def until(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


class Waiting:
    """An agent that waits for ever, and tells what happened to it."""

    def __init__(self) -> None:
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()

        @lr.rollout
        async def agent(task: Any, llm: lr.LLM) -> float:
            if task.get("quick"):
                return 1.0
            self.begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return 0.0

        self.agent = agent
