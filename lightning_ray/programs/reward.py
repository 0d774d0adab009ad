"""What a program earned, by each way to say it: its exit, a file, its last line, HTTP, or a Python function.

A reward is a number, or several by name, of which one is trained on: the agent's ``primary_key``, or what the program
names in ``{"reward": {...}, "primary": ...}``, or the one called ``reward`` or ``primary``, or the only one.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_ray.emitter import emit_reward
from lightning_ray.emitter.rewards import number
from lightning_ray.errors import AgentError
from lightning_ray.programs.outcome import Outcome, failure

Given = float | dict[str, float] | None
RewardFunction = Callable[[Any, Outcome], "Given | Awaitable[Given]"]
RewardWay = Literal["auto", "exit", "file", "http", "stdout"]
WAYS: tuple[RewardWay, ...] = ("auto", "exit", "file", "http", "stdout")
ADVICE = (
    "write a number to the file named by LIGHTNING_REWARD_FILE, or POST it to LIGHTNING_REPORT_URL/reward; or choose "
    'reward="exit" (code 0 earns 1), reward="stdout" (the last line), a function of (task, outcome), or None'
)


async def judge(
    way: RewardWay | RewardFunction | None,
    primary_key: str | None,
    command: str,
    task: Any,
    outcome: Outcome,
    reward_file: Path,
    reported: int,
) -> float | None:
    """The reward; None if it was recorded already, or there is none.

    Raises AgentError for a program that ended badly and said none, and for one that should have said one.
    """
    if callable(way):
        return settled(await called(way, task, outcome), primary_key)
    if way == "exit":
        return 1.0 if outcome.ok else 0.0
    if way in ("auto", "http") and reported:
        return None
    found: Any = None
    if way in ("auto", "file"):
        found = read_file(reward_file)
    elif way == "stdout":
        found = last_reward(outcome.stdout)
    if found is not None:
        return settled(found, primary_key)
    if not outcome.ok:
        raise failure(command, outcome)
    if way is None:
        return None
    wanted = {
        "auto": f"gave no reward: {ADVICE}",
        "file": "wrote no reward to the file named by LIGHTNING_REWARD_FILE",
        "http": "POSTed no reward to LIGHTNING_REPORT_URL/reward",
        "stdout": f"printed no line that is a number or a JSON object; its stdout ends {outcome.stdout[-200:]!r}",
    }
    raise AgentError(f"{command} {outcome.words} and {wanted[way]}")


async def called(function: RewardFunction, task: Any, outcome: Outcome) -> Any:
    """What the function returns; one that is not async runs in a thread."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        return await function(task, outcome)  # type: ignore[misc]
    found = await asyncio.to_thread(function, task, outcome)
    return await found if inspect.isawaitable(found) else found


def read_file(file: Path) -> Any:
    """What a program wrote as its reward; None if nothing. Raises AgentError for what is no reward."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AgentError(f"the file named by LIGHTNING_REWARD_FILE cannot be read: {error}") from None
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        raise AgentError(
            f"the file named by LIGHTNING_REWARD_FILE has {text[:200]!r}; it must be a number, or JSON of a number or "
            'of several by name: {"accuracy": 1, "style": 0.5}'
        ) from None


def last_reward(text: str) -> Any:
    """The last line that is a number or a JSON object; None if there is none."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, (int, float, dict)):
            return found
    return None


def settled(found: Any, primary_key: str | None) -> float | None:
    """A number as it is; several are recorded. Raises AgentError for anything else."""
    if found is None:
        return None
    value, primary = parse_reward(found, primary_key)
    if isinstance(value, float):
        return value
    emit_reward(value, primary_key=primary)
    return None


def parse_reward(found: Any, primary_key: str | None) -> tuple[float | dict[str, float], str | None]:
    """The reward and the primary of several. Raises AgentError for what is none."""
    if isinstance(found, Mapping):
        if set(found) <= {"reward", "primary"} and "reward" in found:
            primary_key = found.get("primary", primary_key)
            found = found["reward"]
        if isinstance(found, Mapping):
            return dimensions(found, primary_key)
    try:
        return number(found, "reward"), None
    except (TypeError, ValueError) as error:
        raise AgentError(str(error)) from None


def dimensions(found: Mapping[str, Any], primary_key: str | None) -> tuple[dict[str, float], str]:
    """Several rewards by name, and which is the primary. Raises AgentError if that is not clear."""
    if primary_key is None:
        likely = [name for name in ("reward", "primary") if name in found] or list(found)
        if len(likely) != 1:
            raise AgentError(
                f"the reward has the dimensions {sorted(found)}; say which is trained on: primary_key= of the "
                'CommandAgent, or {"reward": {...}, "primary": ...}'
            )
        primary_key = likely[0]
    if primary_key not in found:
        raise AgentError(f"the primary dimension {primary_key!r} is not among the reward's {sorted(found)}")
    try:
        return {name: number(value, name) for name, value in found.items()}, primary_key
    except (TypeError, ValueError) as error:
        raise AgentError(str(error)) from None
