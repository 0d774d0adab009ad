"""Hooks: called in order at their moments, and never the agent's failure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.hooks import HookRunner

MOMENTS = ("on_rollout_start", "on_trace_start", "on_trace_end", "on_rollout_end")


class Noting(lr.Hook):
    def __init__(self, name: str, notes: list[Any]):
        self.name = name
        self.notes = notes

    async def on_rollout_start(self, *, agent: Any, runner: Any, rollout: Any) -> None:
        self.notes.append((self.name, "on_rollout_start", rollout))

    async def on_rollout_end(self, *, agent: Any, runner: Any, rollout: Any, spans: Any) -> None:
        self.notes.append((self.name, "on_rollout_end", spans))


class Failing(lr.Hook):
    async def on_rollout_start(self, **arguments: Any) -> None:
        raise KeyError("broken")


class Plain(lr.Hook):
    """Not async, which is forgiven."""

    def on_rollout_start(self, **arguments: Any) -> None:  # type: ignore[override]
        arguments["rollout"].append("plain")


async def test_each_hook_is_called_whatever_the_others_do(caplog: pytest.LogCaptureFixture) -> None:
    notes: list[Any] = []
    rollout: Any = []
    hooks = HookRunner([Noting("a", notes), Failing(), Plain(), Noting("b", notes)])
    await hooks.call("on_rollout_start", agent=1, runner=2, rollout=rollout)
    await hooks.call("on_rollout_end", agent=1, runner=2, rollout=rollout, spans=["s"])
    assert [(name, moment) for name, moment, _ in notes] == [
        ("a", "on_rollout_start"),
        ("b", "on_rollout_start"),
        ("a", "on_rollout_end"),
        ("b", "on_rollout_end"),
    ]
    assert rollout == ["plain"] and notes[-1][2] == ["s"]
    assert "hook Failing failed in on_rollout_start" in caplog.text and "broken" in caplog.text


@pytest.mark.parametrize("moment", MOMENTS)
async def test_every_moment_does_nothing_unless_overridden(moment: Any) -> None:
    arguments: dict[str, Any] = {"agent": 1, "runner": 2, "rollout": 3}
    if "trace" in moment:
        arguments["tracer"] = 4
    if moment == "on_rollout_end":
        arguments["spans"] = []
    await getattr(lr.Hook(), moment)(**arguments)
    await HookRunner(lr.Hook()).call(moment, **arguments)
    await HookRunner().call(moment, **arguments)


async def test_a_hook_does_not_hold_up_a_cancellation() -> None:
    class Waiting(lr.Hook):
        async def on_rollout_start(self, **arguments: Any) -> None:
            await asyncio.Event().wait()

    task = asyncio.create_task(HookRunner(Waiting()).call("on_rollout_start", agent=1, runner=2, rollout=3))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
