"""An engine that sleeps while the trainer updates: what it is told, in order."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from deployments.weights import Weights
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.config import EngineSettings, build
from lightning_ray.errors import ConfigError
from lightning_ray.policy.engine_arguments import engine_arguments

SHARED: dict[str, Any] = {"device": "cuda", "share_gpu": True, "sleep": True}


class Engine:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.renderer = SimpleNamespace(clear_mm_cache_async=self._noting("clear"))
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._noting("pause"))
        for name in ("sleep", "wake_up", "resume_generation", "update_weight_version"):
            setattr(self, name, self._noting(name))

    def _noting(self, name: str) -> Any:
        async def note(*args: Any, **options: Any) -> None:
            self.told.append((name, *args))

        return note


def replica(**settings: Any) -> Any:
    policy: Any = Weights(EngineSettings(**SHARED, **settings))
    marked: list[int] = []

    async def flush() -> None:
        pass

    policy.capture = SimpleNamespace(flush=flush, proved=asyncio.Event(), mark_swap=marked.append, version=0)
    policy.engine, policy.marked, policy.replica_id = Engine(), marked, "r"
    policy.capture.proved.set()
    return policy


@pytest.mark.parametrize(("settings", "level"), [({}, 2), ({"adapter_rank": 4}, 1)])
async def test_it_sleeps_unproved_and_wakes_around_the_next_swap(settings: dict[str, Any], level: int) -> None:
    policy = replica(**settings)
    assert await policy.sleep() == "r"
    assert policy.engine.told == [("clear",), ("pause",), ("sleep", level, "keep")]
    assert policy.asleep and not policy.capture.proved.is_set()
    assert policy.swapping_since is None, "an update may take longer than a swap"
    policy.engine.told.clear()
    await policy._freeze()
    assert policy.engine.told == [("wake_up", ["weights"])] and policy.swapping_since is not None
    policy.engine.told.clear()
    await policy._thaw(7)
    assert policy.engine.told == [("update_weight_version", "7"), ("wake_up", ["kv_cache"])]
    assert policy.marked == [7] and not policy.asleep and not policy.capture.proved.is_set()


async def test_without_sleep_it_is_paused_and_resumed() -> None:
    policy = replica()
    await policy._freeze()
    await policy._thaw(1)
    assert [name for name, *_ in policy.engine.told] == ["clear", "pause", "update_weight_version", "resume_generation"]


async def test_canaries_asked_for_before_a_swap_ends_are_what_proves_it() -> None:
    """Asked for later, they would come behind all that was frozen, or find no room."""
    policy = replica()
    policy.engine.finish_weight_update = policy.engine._noting("finish")

    async def ask(version: int, canaries: list[list[int]]) -> Any:
        policy.engine.told.append(("ask", version))
        answer = asyncio.get_running_loop().create_future()
        answer.set_result([[-1.0]])
        return answer

    policy._ask_canaries, policy._compared = ask, policy.engine._noting("compared")
    policy._judge = lambda version, expected, found, tolerance, compared: found
    await policy._freeze()
    policy.engine.told.clear()
    await policy.end_swap(3, [[1, 2]])
    assert [name for name, *_ in policy.engine.told][:2] == ["finish", "ask"]
    assert "resume_generation" in [name for name, *_ in policy.engine.told][2:]
    assert await policy.prove(3, [[1, 2]], [[-1.0]], 0.1) == [[-1.0]]
    assert [told for told in policy.engine.told if told[0] == "ask"] == [("ask", 3)], "they were asked for again"
    await policy.prove(3, [[1, 2]], [[-1.0]], 0.1)
    assert len([told for told in policy.engine.told if told[0] == "ask"]) == 2, "an answer proves one thing once"


def test_vllm_is_told_of_it_at_its_start() -> None:
    assert "--enable-sleep-mode" in engine_arguments("m", "policy", EngineSettings(**SHARED))
    assert "--enable-sleep-mode" not in engine_arguments("m", "policy", EngineSettings())


def test_sleep_is_for_a_shared_gpu_and_for_steps_one_after_the_other() -> None:
    with pytest.raises(ConfigError, match="sleep leaves a shared GPU to the trainer: set share_gpu=true"):
        build(EngineSettings, {"sleep": True}, "engine")
    with pytest.raises(ConfigError, match=r"engine\.sleep leaves nobody to play during an update: max_staleness=1"):
        build(GRPO, {"model": "m", "engine": SHARED, "max_staleness": 1}, "algorithm")
