"""What the training loop tells of its time, on a run that only lets time pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_ray.algorithms.flow import Group
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.run.phases import PhaseClock
from lightning_ray.run.state import ONLY, RunState
from lightning_ray.run.step_figures import StepTimes
from lightning_ray.stopping import Stop
from lightning_ray.trajectories.account import Account, settle
from lightning_ray.trajectories.episode import Episode
from tests.test_step_figures import Time, episode


class PassingFlow:
    """One group of two rollouts a step."""

    def __init__(self, time: Time) -> None:
        self.time = time

    async def fill(self, version: int) -> None:
        self.time.now += 0.5

    async def take(self, count: int, version: int) -> list[Group]:
        self.time.now += 3.5
        return [Group(0, version, "g", ["a", "b"])]

    def release(self, group_ids: Any) -> None: ...

    async def state(self) -> dict[str, Any]:
        return {}


class PassingRun:
    """Each thing it does takes its own time. It is its folder and its policy, too."""

    def __init__(self, time: Time, rewards: tuple[float, float]) -> None:
        self.time = time
        self.rewards = rewards
        self.state = RunState()
        self.stop = Stop()
        self.folder = self
        self.policies = {ONLY: self}
        self.version = 0
        self.recorded: list[tuple[dict[str, Any], StepTimes]] = []

    async def read_shares(self, rollout_ids: list[str]) -> dict[str, list[Episode]]:
        self.time.now += 1
        pairs = zip(rollout_ids, self.rewards, strict=True)
        return {ONLY: [episode(name, reward, (3, 2)) for name, reward in pairs]}

    def settle(self, episodes: list[Episode], group_of: dict[str, str]) -> Account:
        return settle(episodes, group_of)

    def append_step(self, line: dict[str, Any]) -> None: ...

    def check_tokens(self, account: Any) -> None: ...

    async def update(self, batch: Any) -> dict[str, Any]:
        self.time.now += 2
        return {"trained_tokens": 4.0, "seconds": 2.0}

    async def publish(self, version: int) -> None:
        self.time.now += 1

    async def validate(self) -> None:
        self.time.now += 8

    async def checkpoint(self) -> None:
        self.time.now += 16

    def record_step(self, step: int, played: Any, updates: dict[str, Any], times: StepTimes) -> None:
        self.recorded.append((updates, times))

    async def trace_step(self, step: int, played: Any, times: StepTimes) -> None: ...


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr("lightning_ray.algorithms.loop.time", SimpleNamespace(perf_counter=made))
    return made


async def two_steps(time: Time, rewards: tuple[float, float], **more: Any) -> list[tuple[dict[str, Any], StepTimes]]:
    run = PassingRun(time, rewards)
    settings = GRPO(model="m", steps=9, prompts_per_step=1, group_size=2, validate_every=1, checkpoint_every=1, **more)
    loop: Any = TrainingLoop(settings, run, PhaseClock(time))  # type: ignore[arg-type]
    loop._source._flow = PassingFlow(time)
    for step in range(2):
        await loop._step(step)
    return run.recorded


STEP = {"rollouts": 4.0, "settle": 1.0, "update": 2.0, "swap": 1.0, "other": 0.0}


async def test_validation_and_checkpoint_are_in_the_row_behind_them(time: Time) -> None:
    (_, first), (_, second) = await two_steps(time, (0.0, 1.0))
    assert first == StepTimes(5.0, 8.0, STEP)
    assert second == StepTimes(5.0, 8.0, {**STEP, "validate": 8.0, "checkpoint": 16.0})


async def test_rollouts_are_played_all_the_time_where_training_is_asynchronous(time: Time) -> None:
    (_, first), (_, second) = await two_steps(time, (0.0, 1.0), max_staleness=1)
    assert (first.playing, second.playing) == (8.0, 32.0)


async def test_a_step_that_teaches_nothing_has_no_update(time: Time) -> None:
    (update, times), _ = await two_steps(time, (1.0, 1.0))
    assert update == {} and times == StepTimes(5.0, 5.0, {"rollouts": 4.0, "settle": 1.0, "other": 0.0})
