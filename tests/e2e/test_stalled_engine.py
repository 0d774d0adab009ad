"""An engine that hangs: its replica is started anew, and who called it is answered all the same.

Real Ray, Serve, vLLM in a process of its own, and a trainer rank.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.run.events import read_events
from lightning_ray.run.run import Run
from tests.e2e.started import started
from tests.e2e.tiny import make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
TASKS = [{"question": "w1 w2", "length": 8}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    engine = EngineSettings(process="own", stall_seconds=5, max_model_len=128, kv_cache_memory_mb=16)
    settings = GRPO(model=make_tiny_model, ranks=1, engine=engine)
    runners = RunnerSettings(minimum=1, maximum=1, concurrency=4)
    async with started(tmp_path_factory.mktemp("runs") / "stalled", settings, TASKS, runners) as run:
        yield run


async def test_a_call_to_an_engine_that_hangs_is_answered_by_its_successor(run: Run) -> None:
    [before] = await run.cluster.replicas("describe")
    [engine] = [child for child in psutil.Process(before["pid"]).children() if "EngineCore" in child.name()]
    engine.suspend()
    episodes, _ = await run.play_groups(TASKS, 2, sampled=True)
    assert [episode.rollout.status for episode in episodes] == ["succeeded"] * 2
    [after] = await run.cluster.replicas("describe")
    assert after["pid"] != before["pid"] and after["proved"]
    async with asyncio.timeout(30):
        while not (deaths := [event for event in read_events(run.folder.path) if event["kind"] == "death"]):
            await asyncio.sleep(0.1)
    assert [death["role"] for death in deaths] == ["policy replica"]
    assert "the replica hangs: its engine has not got on with its calls" in deaths[0]["cause"]
    async with asyncio.timeout(30):
        while psutil.pid_exists(engine.pid):
            await asyncio.sleep(0.1)
