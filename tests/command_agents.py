"""Playing a CommandAgent on one attempt, without a runner: what it returns, raises and records."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import psutil

import lightning_ray as lr
from lightning_ray.programs.outcome import PROGRAM_SPAN
from lightning_ray.tracing import AttemptTrace, traced

PROXY = lr.ProxyLLM(endpoint="http://host:1/v1", model="policy", api_key="key-1")
RESOURCES: Any = {"prompt": lr.PromptTemplate(template="Be {kind}."), "main": PROXY}


@dataclass
class Played:
    """One attempt that has ended."""

    result: Any
    trace: AttemptTrace

    @property
    def program(self) -> dict[str, Any]:
        """Attributes of the program's span, without their prefix."""
        [row] = [row for row in self.trace.spans if row["name"] == PROGRAM_SPAN]
        return {key.removeprefix(f"{PROGRAM_SPAN}."): value for key, value in row["attributes"].items()}

    @property
    def stdout(self) -> str:
        return self.program["stdout"]

    @property
    def rewards(self) -> list[Any]:
        found = [row["attributes"].get("agentlightning.reward.0.value") for row in self.trace.spans]
        return [value for value in found if value is not None]


def attempted(number: int = 1, task: Any = None) -> lr.AttemptedRollout:
    attempt = lr.Attempt(rollout_id=f"ro-{number}", attempt_id=f"at-{number}", sequence_id=1, start_time=0.0)
    return lr.AttemptedRollout(rollout_id=f"ro-{number}", input=task, start_time=0.0, attempt=attempt)


async def play(agent: lr.CommandAgent, task: Any = None, resources: Any = RESOURCES, number: int = 1) -> Played:
    """Play one attempt."""
    trace = AttemptTrace(f"ro-{number}", f"at-{number}")
    with traced(trace):
        result = await agent.training_rollout_async(task, resources, attempted(number, task))
    return Played(result, trace)


def python(code: str, *arguments: str, **options: Any) -> lr.CommandAgent:
    """An agent that is a Python program."""
    text = code.replace("{", "{{").replace("}", "}}")
    return lr.CommandAgent([sys.executable, "-I", "-c", text, *arguments], **options)


def sh(code: str, *arguments: str, **options: Any) -> lr.CommandAgent:
    """An agent that is a shell script."""
    return lr.CommandAgent(["sh", "-c", code.replace("{", "{{").replace("}", "}}"), "sh", *arguments], **options)


def running_with(mark: str) -> list[psutil.Process]:
    """Processes that have ``mark`` among their arguments, zombies included."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if mark in (process.info["cmdline"] or []):
            found.append(process)
    return found
