"""An agent that sorts tickets by whatever its prompt says, and leaves a note where it was wrong."""

from __future__ import annotations

import re
from typing import Any

from openai import AsyncOpenAI

import lightning_ray as lr

PROMPT = "Which team is this ticket for: billing, account, engineering, support or lead?\n\n{ticket}"


@lr.rollout
async def sorter(task: dict[str, Any], llm: lr.LLM, prompt_template: lr.PromptTemplate) -> float:
    """1 if the last team that the answer names is the right one."""
    async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as client:
        question: Any = {"role": "user", "content": prompt_template.format(ticket=task["ticket"])}
        answer = await client.chat.completions.create(model=llm.model, messages=[question])
    named = re.findall("billing|account|engineering|support|lead", (answer.choices[0].message.content or "").lower())
    right = named[-1:] == [task["queue"]]
    if not right:
        lr.emit_message(f"the right team was {task['queue']}")
    return float(right)
