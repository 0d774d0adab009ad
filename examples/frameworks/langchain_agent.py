"""LangChain: an agent with a tool."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import get_weather, question, reward


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Runs it to its last message."""
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=llm.model, base_url=llm.endpoint, api_key=llm.api_key)
    reporter = create_agent(model, tools=[get_weather], name="reporter")
    state = await reporter.ainvoke({"messages": [{"role": "user", "content": question(task)}]})
    return reward(task, state["messages"][-1].content)
