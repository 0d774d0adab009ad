"""An engine that makes no step though it has work is told from one that has none, and from one at work."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_ray.policy.engine_load import EngineLoad


def step(running: int, waiting: int) -> Any:
    return SimpleNamespace(
        num_running_reqs=running, num_waiting_reqs=waiting, num_skipped_waiting_reqs=1, kv_cache_usage=0.25
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_only_work_without_a_step_is_a_stall(clock: SimpleNamespace) -> None:
    load = EngineLoad()
    clock.now += 500
    assert load.stalled(at_work=False) == 0, "idle for long"
    clock.now += 5
    assert load.stalled(at_work=True) == 5, "from when it was last seen idle"
    clock.now += 20
    assert load.stalled(at_work=True) == 25
    load.note(step(running=2, waiting=1))
    clock.now += 3
    assert load.stalled(at_work=True) == 3, "since its step"
    load.note(step(running=0, waiting=1))
    assert load.stalled(at_work=True) == 3, "a step that got to nothing"
    assert load.stalled(at_work=False) == 0
    assert load.as_dict() == {"running": 0, "waiting": 2, "kv_cache_use": 0.25}
