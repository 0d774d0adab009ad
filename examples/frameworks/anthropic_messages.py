"""The Anthropic client: its Messages API is served as well."""

from __future__ import annotations

from typing import Any

import lightning_ray as lr
from examples.frameworks.weather import PARAMETERS, get_weather, question, reward


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Calls the model until it uses no tool. The client adds ``/v1`` to its base URL itself."""
    from anthropic import AsyncAnthropic

    messages: list[Any] = [{"role": "user", "content": question(task)}]
    tools: list[Any] = [{"name": "get_weather", "input_schema": PARAMETERS}]
    async with AsyncAnthropic(base_url=llm.endpoint.removesuffix("/v1"), api_key=llm.api_key) as client:
        while True:
            answer = await client.messages.create(model=llm.model, messages=messages, tools=tools, max_tokens=100)
            uses = [block for block in answer.content if block.type == "tool_use"]
            if not uses:
                return reward(task, "".join(block.text for block in answer.content if block.type == "text"))
            results = [
                {"type": "tool_result", "tool_use_id": use.id, "content": get_weather(**use.input)} for use in uses
            ]
            messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
