"""A run that is asked to stop: what is heard when, how long it has, and that nothing is left in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.loop import TrainingLoop
from lightning_ray.job_id import this_job
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.state import RunState
from lightning_ray.stopping import Stop, Stopped, seconds_given, sigterm_kept, stoppable


class EndlessRun:
    """Steps that take no time, until the third, whose rollouts never end. It is its own source."""

    def __init__(self, folder: Path, hanging: int = 2) -> None:
        self.folder = RunFolder(folder)
        self.folder.create(resume=False)
        self.stop, self.state, self.hanging = Stop(), RunState(), hanging
        self.policies: dict[str, Any] = {}
        self.reporter = SimpleNamespace(note=lambda text: self.told.append(text))
        self.told: list[str] = []
        self.saved: list[int] = []
        self.given_up = self.ended = False

    async def start(self, settings: Any) -> None: ...

    async def begin(self) -> None: ...

    async def collect(self, step: int) -> Any:
        if step < self.hanging:
            return SimpleNamespace(shares={}, record=lambda *_: {"step": step})
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.given_up = True
            raise

    def release(self, played: Any) -> None: ...

    def record_step(self, step: int, *_: Any) -> None:
        self.state.step = step + 1

    async def trace_step(self, *_: Any) -> None: ...

    async def state_of_source(self) -> dict[str, Any]:
        return {"next_position": 5}

    async def checkpoint(self) -> None:
        writing = self.folder.begin_checkpoint(self.state.step)
        writing.mkdir()
        self.folder.commit_checkpoint(writing, self.state.step, {"step": self.state.step, "flow": self.state.flow})
        self.saved.append(self.state.step)

    async def finish_source(self) -> None:
        self.ended = True


def loop_of(run: EndlessRun, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> TrainingLoop:
    source: Any = SimpleNamespace(
        begin=run.begin,
        collect=run.collect,
        release=run.release,
        state=run.state_of_source,
        stop=run.finish_source,
    )
    monkeypatch.setattr(GRPO, "source", lambda *_: source)
    monkeypatch.setattr("lightning_ray.stopping.QUEUEING_SECONDS", 0.05)
    return TrainingLoop(GRPO(model="m", steps=9, validate_every=0, **settings), run)  # type: ignore[arg-type]


async def asked_in_its_third_step(loop: TrainingLoop, run: EndlessRun) -> None:
    learning = asyncio.ensure_future(loop.learn())
    while run.state.step < 2:
        await asyncio.sleep(0.01)
    assert run.stop.ask() and not run.stop.ask(), "a second time it is interrupted"
    with pytest.raises(Stopped):
        await learning


async def test_a_stopped_run_has_a_checkpoint_of_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = EndlessRun(tmp_path / "run")
    assert not run.stop.ask(), "nobody listens yet"
    await asked_in_its_third_step(loop_of(run, monkeypatch, checkpoint_every=9), run)
    assert run.folder.read_state() == {"step": 2, "flow": {"next_position": 5}}
    assert run.given_up and run.ended and run.told == ["stopped after step 2, with a checkpoint"]
    assert not run.stop.ask(), "nobody listens any more"


async def test_one_that_has_a_checkpoint_makes_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = EndlessRun(tmp_path / "run")
    await asked_in_its_third_step(loop_of(run, monkeypatch, checkpoint_every=1), run)
    assert run.saved == [1, 2]


async def test_one_without_a_step_claims_no_checkpoint(tmp_path: Path) -> None:
    run = EndlessRun(tmp_path / "run")
    await TrainingLoop(GRPO(model="m", steps=9), run)._keep_the_rest()  # type: ignore[arg-type]
    assert run.saved == [] and run.told == ["stopped before a step was made"]


async def test_what_comes_in_time_is_not_given_up() -> None:
    async def soon() -> int:
        await asyncio.sleep(0.2)
        return 7

    async def fails() -> int:
        await asyncio.sleep(0.2)
        raise ValueError("its own")

    def asked(stop: Stop) -> Stop:
        asyncio.get_running_loop().call_later(0.05, stop.ask)
        return stop

    stop, other = Stop(), Stop()
    with stop.heard():
        assert await asked(stop).unless_asked(soon()) == 7
    with other.heard(), pytest.raises(ValueError, match="its own"):
        await asked(other).unless_asked(fails())


def test_the_time_there_is_depends_on_who_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    assert this_job() is None and seconds_given() == 18
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    assert this_job() == "raysubmit_1" and seconds_given() < 0, "Ray kills a job 3 s after it was stopped"
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    assert seconds_given() == 48


@pytest.mark.parametrize("ctrl_c", ["default_int_handler", "SIG_IGN"])
def test_past_its_deadline_it_is_interrupted(ctrl_c: str) -> None:
    """Also where Ctrl-C is ignored, as it is in what a script put into the background."""
    code = f"""
import asyncio, signal
signal.signal(signal.SIGINT, signal.{ctrl_c})
from lightning_ray.stopping import Stop, run_interruptibly, stoppable

async def helps():
    try:
        await asyncio.sleep(60)
    finally:
        print("the helper ends")

async def work(stop):
    helper = asyncio.ensure_future(helps())
    with stop.heard():
        signal.raise_signal(signal.SIGTERM)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            print("the work ends", helper.done())

stop = Stop()
with stoppable(stop.ask):
    try:
        run_interruptibly(work(stop))
    except KeyboardInterrupt:
        print("interrupted", stop._asked.is_set())
print(signal.getsignal(signal.SIGINT) is signal.{ctrl_c})
"""
    environment = os.environ | {"RAY_JOB_STOP_WAIT_TIME_S": "12.3"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50)
    expected = ["the work ends False", "the helper ends", "interrupted True", "True"]
    assert told.stdout.splitlines() == expected, told.stderr


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_without_a_run_that_listens_sigterm_is_an_interrupt(ctrl_c: Any) -> None:
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt), stoppable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_who_handled_sigterm_before_ray_does_behind_it() -> None:
    with stoppable():
        before = signal.getsignal(signal.SIGTERM)
        with sigterm_kept():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        assert signal.getsignal(signal.SIGTERM) is before


async def test_work_that_is_always_done_in_time_does_not_keep_a_run_from_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is begun when it is asked to stop may come to its end, and nothing is begun after that."""
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    stop, begun = Stop(), list[int]()

    async def work(number: int) -> int:
        begun.append(number)
        await asyncio.sleep(0.01)
        return number

    with stop.heard():
        assert await stop.unless_asked(work(0)) == 0
        assert stop.ask()
        with pytest.raises(Stopped):
            await stop.unless_asked(work(1))
    assert begun == [0]
