"""AutoGen: a team of a planner and a reporter, who has the tool."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import get_weather, question, reward


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Lets each speak once; the last message counts."""
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.conditions import SourceMatchTermination
    from autogen_agentchat.teams import RoundRobinGroupChat
    from autogen_core.models import ModelInfo
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info = ModelInfo(vision=False, function_calling=True, json_output=False, structured_output=False, family="unknown")
    model = OpenAIChatCompletionClient(
        model=llm.model, base_url=llm.endpoint, api_key=llm.api_key or "", model_info=info
    )
    planner = AssistantAgent("planner", model, system_message="Plan.")
    reporter = AssistantAgent("reporter", model, tools=[get_weather], max_tool_iterations=3)
    team = RoundRobinGroupChat([planner, reporter], termination_condition=SourceMatchTermination(["reporter"]))
    result = await team.run(task=question(task))
    return reward(task, result.messages[-1].to_text())
