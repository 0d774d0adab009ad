"""Agents in processes of their own: whatever one does to its process costs its attempt alone, and is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import lightning_ray as lr
from lightning_ray.isolation.calls import CallsInProcesses
from lightning_ray.isolation.process import MARK
from lightning_ray.runner import Runner
from lightning_ray.store import LocalStoreClient, SpanStore, read_spans
from lightning_ray.store import service as service_module
from lightning_ray.types import EnqueueRolloutRequest as Request
from lightning_ray.types import RolloutConfig, Span
from tests.runner_agents import async_agent, sync_agent

ENDPOINT = lr.LLM(endpoint="http://host:1/v1", model="policy")
OWN = "LIGHTNING_RAY_TEST_OWN"
both = pytest.mark.parametrize("agent", [async_agent, sync_agent], ids=["async", "sync"])


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "WATCH_SECONDS", 0.02)
    monkeypatch.setenv(OWN, str(os.getpid()))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalStoreClient]:
    client = LocalStoreClient(SpanStore(tmp_path, fsync="none"))
    await client.update_resources("sampled", {"main_llm": ENDPOINT})
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def playing(store: Any, agent: Any, concurrency: int = 2) -> AsyncIterator[None]:
    calls = CallsInProcesses(agent)
    await calls.open(concurrency)
    runner = Runner(agent, store, "w-1", b"s" * 32, concurrency, calls=calls)
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert children() == []


def children() -> list[int]:
    """Children of this test's runners."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if (
                MARK in environment
                and environment.get(OWN) == os.environ[OWN]
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process.pid)
    return found


async def play(store: Any, agent: Any, *tasks: Any, config: RolloutConfig | None = None) -> list[Any]:
    """Play the tasks to their ends."""
    queued = await store.enqueue_many_rollouts([Request(input=task, config=config) for task in tasks])
    ids = [rollout.rollout_id for rollout in queued]
    async with playing(store, agent):
        ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
    assert len(ended) == len(ids)
    return (await store.query_rollouts(rollout_id_in=ids)).items


async def spans_of(store: Any, rollout: Any) -> list[Span]:
    return read_spans(await store.scan_spans([rollout.rollout_id]))


@both
async def test_spans_and_reward_come_back_and_the_process_is_kept(store: Any, agent: Any) -> None:
    rollouts = await play(store, agent, *[{"do": "pid", "reward": n} for n in range(8)])
    pids = set()
    for number, rollout in enumerate(rollouts):
        assert rollout.status == "succeeded", rollout.metadata
        begun, pid, reward = await spans_of(store, rollout)
        assert begun.attributes == {"begun": 1} and reward.attributes["agentlightning.reward.0.value"] == number
        assert len({span.trace_id for span in (begun, pid, reward)}) == 1
        pids.add(pid.attributes["pid"])
    assert len(pids) <= 2 and os.getpid() not in pids


@both
@pytest.mark.parametrize(
    ("do", "reason"), [("raise", 'KeyError: "the agent\'s own defect"'), ("quit", "SystemExit: bye")]
)
async def test_what_the_agent_raises_is_its_own_failure(store: Any, agent: Any, do: str, reason: str) -> None:
    failed, well = await play(store, agent, {"do": do}, {})
    assert failed.metadata["failure"] == {"kind": "failed", "reason": reason}
    assert [span.name for span in await spans_of(store, failed)][-1] == "agentlightning.exception"
    assert well.status == "succeeded"


@pytest.mark.parametrize(
    ("how", "words"),
    [("segfault", "was ended by SIGSEGV"), ("exit", "exited with code 7"), ("kill", "was ended by SIGKILL")],
)
async def test_a_crash_is_told_and_the_rollout_is_played_again(store: Any, how: str, words: str) -> None:
    [rollout] = await play(store, async_agent, {"do": "crash", "how": how})
    assert rollout.status == "succeeded"
    first, second = (await store.query_attempts(rollout.rollout_id)).items
    assert first.status == "failed" and first.metadata["infrastructure"] is True
    assert words in first.metadata["reason"] and "these are last words" in first.metadata["reason"]
    spans = [span for span in await spans_of(store, rollout) if span.attempt_id == first.attempt_id]
    assert [span.attributes.get("begun") for span in spans] == [1, None]
    assert second.status == "succeeded"


@both
async def test_a_timeout_ends_the_process_at_once(store: Any, agent: Any) -> None:
    config = RolloutConfig(timeout_seconds=2.0)
    began = time.monotonic()
    [rollout] = await play(store, agent, {"do": "spin"}, config=config)
    assert time.monotonic() - began < 30.0, "it goes on for ever by itself"
    assert rollout.metadata["failure"]["kind"] == "timeout"
    assert [span.attributes for span in await spans_of(store, rollout)] == [{"begun": 1}]


async def test_what_an_agent_started_ends_with_its_process(store: Any) -> None:
    [rollout] = await play(store, async_agent, {"do": "leave"})  # playing() looks for what is left
    assert rollout.status == "succeeded"


async def test_a_span_that_cannot_be_stored_fails_the_attempt_by_name(store: Any) -> None:
    [rollout] = await play(store, async_agent, {"do": "unstorable"})
    assert rollout.status == "failed" and "span 'odd'" in rollout.metadata["failure"]["reason"]
    assert [span.attributes.get("fine") for span in await spans_of(store, rollout)] == [None, 1, None]


class Unloadable(lr.LitAgent[Any]):
    """An agent that exists in the test's process only."""

    def __reduce__(self) -> Any:
        return refuse, (os.getpid(),)


def refuse(pid: int) -> Any:
    if os.getpid() != pid:
        raise ImportError("no module named 'secret_sauce'")


async def test_an_agent_that_cannot_be_loaded_says_so(store: Any) -> None:
    [rollout] = await play(store, Unloadable(), {})
    assert rollout.metadata["failure"]["kind"] == "failed"
    assert (
        "cannot be loaded in its process: ImportError: no module named 'secret_sauce'"
        in (rollout.metadata["failure"]["reason"])
    )
