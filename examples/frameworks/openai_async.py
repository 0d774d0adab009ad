"""The OpenAI client, async: a loop over chat completions and a tool."""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI

import lightning_ray as lr
from examples.frameworks.weather import PARAMETERS, get_weather, question, reward

TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


@lr.rollout
async def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Calls the model until it calls no tool."""
    messages: list[Any] = [{"role": "user", "content": question(task)}]
    async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as client:
        while True:
            answer = await client.chat.completions.create(model=llm.model, messages=messages, tools=TOOLS)
            message = answer.choices[0].message
            if not message.tool_calls:
                return reward(task, message.content)
            messages.append(message)
            for call in message.tool_calls:
                result = get_weather(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
