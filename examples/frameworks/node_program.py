"""A Node program with the ``openai`` package of npm; run ``npm install`` in its folder once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import WEATHER, reward

PROGRAM = Path(__file__).parent / "node" / "agent.mjs"
WEATHER_AS_JSON = json.dumps(WEATHER).replace("{", "{{").replace("}", "}}")  # a template, whose braces are doubled


def judge(task: dict[str, Any], outcome: Any) -> float:
    """What it printed is its answer."""
    return reward(task, outcome.stdout)


agent = lr.CommandAgent(["node", str(PROGRAM), "{task.city}"], reward=judge, stdin=WEATHER_AS_JSON)
