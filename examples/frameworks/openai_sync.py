"""The OpenAI client, not async, with the Responses API: what was said so far goes along with each request."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

import lightning_ray as lr
from examples.frameworks.weather import PARAMETERS, get_weather, question, reward

TOOLS: list[Any] = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}]


@lr.rollout
def agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Calls the model until it calls no tool."""
    client = OpenAI(base_url=llm.endpoint, api_key=llm.api_key)
    said: list[Any] = [{"role": "user", "content": question(task)}]
    while True:
        answer = client.responses.create(model=llm.model, input=said, tools=TOOLS, store=False)
        said += answer.output
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            return reward(task, answer.output_text)
        for call in calls:
            result = get_weather(**json.loads(call.arguments))
            said.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
