"""Agents that end well, badly, late or never; importable, so that other processes can play them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

import lightning_ray as lr


@lr.rollout
async def trivial(task: Any, llm: lr.LLM) -> float:
    """Returns a reward."""
    return 1.0


def behave(task: dict[str, Any], rollout: Any) -> Any:
    """What the task says, once it has left a span."""
    lr.emit_annotation({"begun": 1})
    print("these are", "last words", flush=True)
    do = task.get("do")
    if do == "crash" and rollout.attempt.sequence_id <= task.get("times", 1):
        if task.get("how") == "segfault":
            ctypes.string_at(0)
        if task.get("how") == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "raise":
        raise KeyError("the agent's own defect")
    if do == "quit":
        sys.exit("bye")
    if do == "leave":
        subprocess.Popen(["sleep", "1000"])
    if do == "pid":
        lr.emit_annotation({"pid": os.getpid()})
    if do == "spin":
        while True:
            pass
    if do == "sleep":
        time.sleep(task["seconds"])
    if do == "unstorable":
        lr.emit_annotation({"fine": 1})
        return [lr.Span.model_construct(**span_fields(rollout, {"bad": object()}))]
    return task.get("reward", 1.0)


def span_fields(rollout: Any, attributes: dict[str, Any]) -> dict[str, Any]:
    """A span's fields."""
    return {
        "rollout_id": rollout.rollout_id,
        "attempt_id": rollout.attempt.attempt_id,
        "sequence_id": 0,
        "trace_id": "0" * 32,
        "span_id": "1" * 16,
        "parent_id": None,
        "name": "odd",
        "start_time": 1.0,
        "end_time": 2.0,
        "status": {"status_code": "OK", "description": None},
        "attributes": attributes,
    }


@lr.rollout
def sync_agent(task: dict[str, Any], llm: lr.LLM, rollout: Any) -> Any:
    """Does what the task says."""
    return behave(task, rollout)


@lr.rollout
async def async_agent(task: dict[str, Any], llm: lr.LLM, rollout: Any) -> Any:
    """Does what the task says."""
    await asyncio.sleep(task.get("wait", 0))
    return behave(task, rollout)


@lr.rollout
async def sleeper(task: dict[str, Any], llm: lr.LLM) -> float:
    """Takes as long as the task says."""
    await asyncio.sleep(task["seconds"])
    return 1.0


class DiesWhenLoaded(lr.LitAgent[Any]):
    """Exists in the process that made it only."""

    def __reduce__(self) -> Any:
        return refuse, (os.getpid(),)


def refuse(pid: int) -> Any:
    """An import that fails in any other process."""
    if os.getpid() != pid:
        raise ImportError("no module of mine")
    return dies_when_loaded


dies_when_loaded = DiesWhenLoaded()
