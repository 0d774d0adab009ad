"""A replica that hangs is told from one that is idle, at work, or busy with a swap."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_ray.policy.engine_load import EngineLoad
from lightning_ray.policy.stalls import StallWatch


class Replica:
    """Looked at every five seconds, by a clock that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.load = EngineLoad()
        self.watch = StallWatch(self.load, 20)

    def step(self, running: int, waiting: int, outputs: bool = False) -> None:
        stats: Any = SimpleNamespace(
            num_running_reqs=running, num_waiting_reqs=waiting, num_skipped_waiting_reqs=0, kv_cache_usage=0.25
        )
        self.load.note(stats, outputs)

    def look(self, times: int, at_work: bool = True, swapping: bool = False, held_up: float = 0.0) -> None:
        for _ in range(times):
            self.now += 5
            self.watch.check(at_work, swapping, held_up)


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    return Replica(monkeypatch)


def test_work_without_progress_is_a_stall(replica: Replica) -> None:
    replica.look(100, at_work=False)
    replica.look(5)
    with pytest.raises(RuntimeError, match=r"has not got on with its calls for 25 s; .*engine\.stall_seconds"):
        replica.look(1)


@pytest.mark.parametrize("step", [(1, 0), (0, 0), (0, 3, True), (1, 3)])
def test_an_engine_that_gets_on_hangs_not(replica: Replica, step: Any) -> None:
    for _ in range(50):
        replica.look(2)
        replica.step(*step)


def test_steps_that_get_to_nothing_are_no_progress(replica: Replica) -> None:
    replica.look(1)
    with pytest.raises(RuntimeError, match="has not got on"):
        for _ in range(6):
            replica.look(1)
            replica.step(0, 2)


def test_requests_that_are_not_to_be_worked_on_wait_for_no_engine(replica: Replica) -> None:
    replica.look(2)
    replica.look(50, swapping=True)
    replica.look(5)
    with pytest.raises(RuntimeError, match="for 25 s"):
        replica.look(1)


def test_clients_that_give_up_and_call_again_hide_no_stall(replica: Replica) -> None:
    replica.look(3)
    replica.look(1, at_work=False)
    replica.look(1)
    replica.look(1, at_work=False)
    with pytest.raises(RuntimeError, match="has not got on"):
        replica.look(1)


def test_an_engine_that_steps_once_the_last_client_has_left_is_idle(replica: Replica) -> None:
    replica.look(1)
    replica.step(0, 0)
    replica.look(50, at_work=False)
    replica.look(5)


def test_calls_that_do_not_get_to_the_engine_are_a_stall(replica: Replica) -> None:
    replica.look(1, at_work=False, held_up=20)
    with pytest.raises(RuntimeError, match="no call got to it for 21 s"):
        replica.look(1, at_work=False, held_up=21)
