"""AgentScope: a planner, then a reporter, who has the tool."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import get_weather, question, reward


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Lets one reply to the other; the reporter's answer counts."""
    from agentscope.agent import Agent
    from agentscope.credential import OpenAICredential
    from agentscope.message import UserMsg
    from agentscope.model import OpenAIChatModel
    from agentscope.tool import FunctionTool, Toolkit

    credential = OpenAICredential(api_key=llm.api_key, base_url=llm.endpoint)
    model = OpenAIChatModel(credential, llm.model)
    planner = Agent("planner", "Plan.", model)
    reporter = Agent("reporter", "Report.", model, Toolkit([FunctionTool(get_weather, is_read_only=True)]))
    asked = UserMsg("user", question(task))
    plan = await planner.reply(asked)
    answer = await reporter.reply([asked, plan])
    return reward(task, answer.get_text_content())
