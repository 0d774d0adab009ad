"""Agents of many frameworks, unchanged but for their base URL, give exact trajectories that name their agents.

Those of ``examples/frameworks``, each in an environment of its own, which has the framework and no Ray, torch or vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from examples.frameworks.weather import TASKS
from lightning_ray.isolation.calls import CallsInProcesses
from lightning_ray.runner import Runner
from lightning_ray.trajectories.episode import Episode, calls_of, last_attempts, read_episodes
from lightning_ray.trajectories.join import join_calls
from lightning_ray.types import EnqueueRolloutRequest, RolloutConfig
from tests.e2e.wire.served import Served
from tests.tool_model import hermes_call

pytestmark = pytest.mark.asyncio(loop_scope="session")
ROOT = Path(__file__).resolve().parent.parent.parent
PLAYED = TASKS[:4]
HERE = ["openai_async", "openai_sync", "anthropic_messages"]
"""Agents of packages that this environment has as well."""
ONE, TWO = {None: 2}, {"planner": 1, "reporter": 2}
ELSEWHERE: dict[str, tuple[str | None, dict[str | None, int]]] = {
    "openai_async": ("openai", ONE),
    "openai_sync": ("openai", ONE),
    "anthropic_messages": ("anthropic", ONE),
    "openai_agents_sdk": ("openai_agents", TWO),
    "langchain_agent": ("langchain", {"reporter": 2}),
    "langgraph_graph": ("langgraph", TWO),
    "autogen_team": ("autogen", TWO),
    "crewai_crew": ("crewai", TWO),
    "agent_framework_agents": ("agent_framework", TWO),
    "agentscope_agents": ("agentscope", TWO),
    "node_program": (None, ONE),
}
"""Each example's environment, and how many model calls each of its agents makes."""


@contextlib.asynccontextmanager
async def playing(served: Served, agent: Any, python: str | None) -> AsyncIterator[None]:
    """A runner in this process, whose agent another interpreter plays."""
    calls = None if python is None else CallsInProcesses(agent, python)
    runner = Runner(agent, served.store, "w-1", served.cluster.secret, 2, calls=calls)
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def play(served: Served, example: str, python: str | None) -> tuple[list[Episode], pa.Table]:
    """The tasks' episodes and their captured model calls."""
    agent = importlib.import_module(f"examples.frameworks.{example}").agent
    config = RolloutConfig(timeout_seconds=90.0, max_attempts=1)
    requests = [EnqueueRolloutRequest(input=task, resources_id="greedy", config=config) for task in PLAYED]
    queued = await served.store.enqueue_many_rollouts(requests)
    ids = [rollout.rollout_id for rollout in queued]
    async with playing(served, agent, python):
        await served.store.wait_for_rollouts(rollout_ids=ids, timeout=120)
    rollouts = {rollout.rollout_id: rollout for rollout in await served.store.query_rollouts(rollout_id_in=ids)}
    spans = await served.store.scan_spans(ids)
    attempts = [attempt for each in ids for attempt in await served.store.query_attempts(each)]
    episodes = read_episodes([rollouts[each] for each in ids], spans, last_attempts(attempts))
    return episodes, spans.filter(pc.is_valid(spans["prompt_ids"]))


def check(served: Served, episodes: list[Episode], calls: pa.Table, expected: dict[str | None, int]) -> None:
    """Each rollout succeeded, and each of its agents has one trajectory, of exactly what was sampled."""
    for task, episode in zip(PLAYED, episodes, strict=True):
        assert episode.rollout.status == "succeeded", episode.rollout.metadata
        assert episode.reward == 1.0 and episode.calls >= 2
        own = calls.filter(pc.equal(calls["rollout_id"], episode.rollout_id))
        assert Counter(own["agent"].to_pylist()) == expected
        for row in own.to_pylist():
            assert row["prompt_ids"] and row["sampled_ids"] and row["finish_reason"] == "stop"
            assert len(row["sampled_ids"]) == len(row["logprobs"]) == len(row["weight_versions"])
        said = [served.text(row["sampled_ids"]) for row in own.to_pylist()]
        assert hermes_call("get_weather", {"city": task["city"]}) + "<|im_end|>" in said
        for agent, count in expected.items():
            mine = own.filter(pc.equal(own["agent"], agent) if agent else pc.is_null(own["agent"]))
            [trajectory] = join_calls(calls_of(mine)[episode.rollout_id])
            assert trajectory.calls == count
            sampled = [token for row in mine.to_pylist() for token in row["sampled_ids"]]
            assert trajectory.token_ids[trajectory.mask == 1].tolist() == sampled


@pytest.mark.e2e
@pytest.mark.parametrize("example", HERE)
async def test_a_client_of_this_environment(served: Served, example: str) -> None:
    episodes, calls = await play(served, example, None)
    check(served, episodes, calls, ELSEWHERE[example][1])


@pytest.mark.frameworks
@pytest.mark.parametrize("example", list(ELSEWHERE))
async def test_a_framework_in_its_own_environment(
    served: Served, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, expected = ELSEWHERE[example]
    python = None if environment is None else ROOT / ".frameworks" / environment / "bin" / "python"
    assert python is None or python.exists(), f"there is no {python}: run make test-frameworks"
    monkeypatch.setenv("CREWAI_DISABLE_TELEMETRY", "true")
    episodes, calls = await play(served, example, None if python is None else str(python))
    check(served, episodes, calls, expected)
