"""Canaries are planned alone where nothing runs, and otherwise within the limits of what does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

from lightning_ray.policy.canary_scheduler import _CanariesFirst


class Request:
    """As much of one as matters."""

    def __init__(self, name: str):
        self.request_id = name


class Scheduler:
    """Plans what waits, in order, as long as there are places; refuses to have more running than those, as vLLM's."""

    places = 2

    def __init__(self, waiting: list[str], running: list[str]):
        self.policy = SchedulingPolicy.FCFS
        self.waiting, self.skipped_waiting = create_request_queue(self.policy), create_request_queue(self.policy)
        for name in waiting:
            self.waiting.add_request(Request(name))  # type: ignore[arg-type]
        self.running: list[Any] = [Request(name) for name in running]

    def schedule(self) -> list[str]:
        assert len(self.running) <= self.places
        while self.waiting and len(self.running) < self.places:
            self.running.append(self.waiting.pop_request())
        return [request.request_id for request in self.running]


class First(_CanariesFirst, Scheduler):
    """As over vLLM's own."""


def left(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.waiting]


def test_after_a_swap_they_are_alone_in_their_step() -> None:
    scheduler = First(["a", "b", "canary-1-0", "canary-1-1"], [])
    assert scheduler.schedule() == ["canary-1-0", "canary-1-1"] and left(scheduler) == ["a", "b"]


def test_what_finds_no_place_waits_before_all_others() -> None:
    scheduler = First(["a", *(f"canary-1-{index}" for index in range(3))], [])
    assert scheduler.schedule() == ["canary-1-0", "canary-1-1"]
    assert left(scheduler) == ["canary-1-2", "a"]


@pytest.mark.parametrize(("running", "planned"), [(["x"], ["x", "canary-1-0"]), (["x", "y"], ["x", "y"])])
def test_beside_others_they_are_next_in_line_and_take_no_place_that_is_not_there(
    running: list[str], planned: list[str]
) -> None:
    scheduler = First(["a", "canary-1-0", "canary-1-1"], running)
    assert scheduler.schedule() == planned
    scheduler.schedule()
    assert left(scheduler)[-1] == "a" and left(scheduler)[0].startswith("canary")
    scheduler.running = []
    assert all(name.startswith("canary") for name in scheduler.schedule())
