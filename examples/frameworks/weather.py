"""The task of all agents here: say what the weather is like in a city. Only a tool knows."""

from __future__ import annotations

from typing import Any

WEATHER = {
    "paris": "sunny",
    "oslo": "snowy",
    "rome": "windy",
    "cairo": "cloudy",
    "lima": "foggy",
    "tokyo": "rainy",
    "delhi": "cloudy",
    "quito": "rainy",
}
TASKS = [{"city": city} for city in WEATHER]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def get_weather(city: str) -> str:
    """The weather in a city."""
    return WEATHER.get(city, "unknown")


def question(task: dict[str, Any]) -> str:
    """What the user asks."""
    return f"What is the weather like in {task['city']}?"


def reward(task: dict[str, Any], answer: Any) -> float:
    """1 if the answer says it."""
    return float(WEATHER[task["city"]] in str(answer).lower())
