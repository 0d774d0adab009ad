"""Microsoft Agent Framework: a planner, then a reporter, who has the tool."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import get_weather, question, reward


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Runs one after the other; the reporter's answer counts."""
    from agent_framework import Agent
    from agent_framework.openai import OpenAIChatCompletionClient

    client = OpenAIChatCompletionClient(model=llm.model, base_url=llm.endpoint, api_key=llm.api_key)
    planner = Agent(client, name="planner", instructions="Plan.")
    reporter = Agent(client, name="reporter", instructions="Report.", tools=[get_weather])
    plan = await planner.run(question(task))
    answer = await reporter.run(f"{question(task)} {plan.text}")
    return reward(task, answer.text)
