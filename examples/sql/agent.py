"""The SQL agent, as a user would write it: the plain OpenAI client, a few turns, a real database as its tool."""

from __future__ import annotations

from contextlib import closing
from functools import cache
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

import lightning_ray as lr
from examples.sql.task import DONE, MAX_TOKENS, MAX_TURNS, is_correct, open_database, run_query


@cache
def connections() -> DefaultAsyncHttpxClient:
    """One pool for all rollouts of a process: each client of its own would load the CA certificates again (25 ms)."""
    return DefaultAsyncHttpxClient()


@lr.rollout
async def sql_agent(task: dict[str, Any], llm: lr.LLM) -> float:
    """Query until the model says DONE or has no turn left; 1 if its last query returns the gold rows.

    ``corrected`` is annotated once for each failing query with a turn left: whether the next one ran.
    """
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key, http_client=connections())
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    query, failed = None, False
    with closing(open_database(task)) as database:
        for _ in range(MAX_TURNS):
            answer = await client.chat.completions.create(model=llm.model, messages=messages, max_tokens=MAX_TOKENS)
            text = answer.choices[0].message.content or ""
            done = text.strip() == DONE
            rows, result = (None, "") if done else run_query(database, text, hint=task.get("hint", True))
            if failed:
                lr.emit_annotation({"corrected": rows is not None})
            if done:
                break
            query, failed = text, rows is None
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": result}]
    return float(query is not None and is_correct(task, query))
