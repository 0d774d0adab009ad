"""OpenAI Agents SDK: a planner hands over to a reporter, who has the tool."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import get_weather, question, reward


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Runs both; the reporter's answer counts."""
    from agents import Agent, OpenAIResponsesModel, Runner, function_tool
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as client:
        model = OpenAIResponsesModel(model=llm.model, openai_client=client)
        reporter = Agent(name="reporter", model=model, instructions="Report.", tools=[function_tool(get_weather)])
        planner = Agent(name="planner", model=model, instructions="Hand over.", handoffs=[reporter])
        result = await Runner.run(planner, question(task))
    return reward(task, result.final_output)
