"""Two replicas: an attempt's calls go to one, attempts are spread over both, the loss of one is no agent's business.

Real Ray, Serve, HAProxy, vLLM and a trainer rank; one cluster for all tests of this file, in their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gc
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio
from ray.serve._private.router import SingletonThreadRouter

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.run.run import Run
from tests.e2e.started import started
from tests.e2e.tiny import make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
TASKS = [{"question": "w1 w2", "length": 8}]
AGENTS, CALLS = 40, 4
PAUSE = 0.2
"""Seconds between two calls of an agent."""
LONG = 100
"""Tokens of a call that takes longer than such a pause."""
BACK_SECONDS = 300.0
AS_IT_IS: dict[str, Any] = {"max_retries": 0, "timeout": 60.0}
"""Settings of a client that hides nothing."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    engine = EngineSettings(replicas=2, max_model_len=128, kv_cache_memory_mb=16)
    settings = GRPO(model=make_tiny_model, ranks=1, engine=engine)
    async with started(tmp_path_factory.mktemp("runs") / "replicas", settings, TASKS, RunnerSettings()) as run:
        yield run


@dataclass
class Attempt:
    """One attempt and what its agent heard: the ids of each answer."""

    rollout_id: str
    attempt_id: str
    client: openai.AsyncOpenAI
    heard: list[list[int]] = field(default_factory=list)

    async def call(self, tokens: int = 24) -> None:
        """One call, which no SDK sends again."""
        answer: Any = await self.client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": "w1 w2"}],
            max_tokens=tokens,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        self.heard.append(answer.choices[0].token_ids)

    async def call_by_key_alone(self) -> None:
        """A call of Anthropic's client, which says whose it is by another header and by no path."""
        root = str(self.client.base_url).partition("/rollout/")[0]
        async with anthropic.AsyncAnthropic(base_url=root, api_key=self.client.api_key, **AS_IT_IS) as client:
            await client.messages.create(model="policy", messages=[{"role": "user", "content": "w1 w2"}], max_tokens=8)


@asynccontextmanager
async def attempt_of(run: Run) -> AsyncIterator[Attempt]:
    """A fresh attempt, with a client of its own."""
    begun = await run.store.start_rollout({})
    ids = begun.rollout_id, begun.attempt.attempt_id
    resources = await run.store.get_resources_by_id("sampled")
    assert resources is not None
    llm: Any = resources.resources["main_llm"]
    key = issue_key(run.cluster.secret, Claims(*ids, time.time() + 600))
    async with openai.AsyncOpenAI(base_url=llm.get_base_url(*ids), api_key=key, **AS_IT_IS) as client:
        yield Attempt(*ids, client)


async def given(run: Run) -> tuple[str, Counter[str]]:
    """How many calls HAProxy has given to each replica, and its process: a new one, as Serve starts when it hears of
    replicas, counts from 0.
    """
    assert run.cluster._own is not None
    [admin] = (run.cluster._own.path / "haproxy").glob("*/admin.sock")
    async with asyncio.timeout(10.0):
        reader, writer = await asyncio.open_unix_connection(admin)
        writer.write(b"show info;show stat\n")
        info, _, statistics = (await reader.read()).decode().partition("# ")
    writer.close()
    [process] = [line for line in info.splitlines() if line.startswith("Pid:")]
    rows = [row for row in csv.DictReader(statistics.splitlines()) if row["svname"] not in ("FRONTEND", "BACKEND")]
    return process, Counter({row["svname"]: int(row["stot"]) for row in rows if row["stot"]})


async def routed(run: Run) -> Counter[str]:
    """How many of a fresh attempt's three calls each replica was given."""
    for _ in range(5):
        async with attempt_of(run) as attempt:
            process, before = await given(run)
            await attempt.call()
            await attempt.call_by_key_alone()
            await attempt.call()
            counted_by, after = await given(run)
        if counted_by == process:
            return after - before
    raise AssertionError("no attempt could be counted: HAProxy is started anew all the time")


async def test_calls_of_one_attempt_go_to_one_replica_and_attempts_are_spread(run: Run) -> None:
    used: Counter[str] = Counter()
    for _ in range(32):
        to = await routed(run)
        assert list(to.values()) == [3], to
        used.update(to.keys())
    assert len(used) == 2 and min(used.values()) >= 2, used


async def test_a_dropped_client_takes_no_call_along_when_serves_thread_collects_it(run: Run) -> None:
    serves_loop = SingletonThreadRouter._asyncio_loop

    def collect() -> None:
        gc.collect()
        time.sleep(1.3 * PAUSE)  # what finalizers want of this loop happens while another call is at work

    for _ in range(4):
        async with attempt_of(run) as attempt:
            dropped = openai.AsyncOpenAI(base_url=attempt.client.base_url, api_key=attempt.client.api_key, **AS_IT_IS)
            await Attempt(attempt.rollout_id, attempt.attempt_id, dropped).call()
            del dropped
            serves_loop.call_soon_threadsafe(collect)
            await asyncio.sleep(PAUSE)
            await attempt.call(LONG)


async def play(run: Run, attempts: list[Attempt], enough: asyncio.Event) -> None:
    """One agent: attempts of a few calls, one after the other, until there were enough."""
    while not enough.is_set():
        async with attempt_of(run) as attempt:
            attempts.append(attempt)
            for _ in range(CALLS):
                await attempt.call()
                await asyncio.sleep(PAUSE)


async def back(run: Run, gone: int) -> list[Any]:
    """The replicas, once there are two again and both are proved."""
    async with asyncio.timeout(BACK_SECONDS):
        while True:
            with contextlib.suppress(Exception):  # a replica that is dead and not yet known to be
                members = await run.cluster.replicas("describe")
                if len(members) == 2 and all(m["proved"] and m["pid"] != gone for m in members):
                    return members
            await asyncio.sleep(0.5)


async def test_the_loss_of_a_replica_under_load_is_no_agents_business(run: Run) -> None:
    attempts: list[Attempt] = []
    enough = asyncio.Event()
    agents = [asyncio.create_task(play(run, attempts, enough)) for _ in range(AGENTS)]
    await asyncio.sleep(2.0)
    [first, _] = await run.cluster.replicas("describe")
    os.kill(first["pid"], signal.SIGKILL)
    members = await back(run, first["pid"])
    seen = sum(len(attempt.heard) for attempt in attempts)
    await asyncio.sleep(2.0)
    enough.set()
    await asyncio.gather(*agents)
    assert sum(len(attempt.heard) for attempt in attempts) > seen, "calls go on"
    assert {member["version"] for member in members} == {run.state.version}
    again = 0
    for attempt in attempts:
        spans = (await run.store.scan_spans([attempt.rollout_id], attempt.attempt_id)).to_pylist()
        answered = [span["sampled_ids"] for span in spans if span["status"] == "OK"]
        again += len(answered) - len(attempt.heard)
        assert all(ids in answered for ids in attempt.heard), "every answer is in the store"
        assert all(len(span["logprobs"]) == len(span["sampled_ids"]) for span in spans)
    assert 0 <= again <= AGENTS, "calls that the lost replica had stored and not yet answered"


async def test_both_replicas_are_at_work_again(run: Run) -> None:
    await test_calls_of_one_attempt_go_to_one_replica_and_attempts_are_spread(run)
