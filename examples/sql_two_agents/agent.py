"""Two agents over one database: a writer of queries, and a checker that accepts a query or has it written again."""

from __future__ import annotations

from contextlib import closing
from statistics import fmean
from typing import Any

from openai import AsyncOpenAI

import lightning_ray as lr
from examples.sql.agent import connections
from examples.sql.task import DONE, MAX_TOKENS, MAX_TURNS, is_correct, open_database, run_query

VERDICT_TOKENS = 1
"""The checker's word: DONE accepts, anything else rejects."""


@lr.rollout
async def write_and_check(task: dict[str, Any], llms: dict[str, lr.LLM]) -> None:
    """Write, look at what the database says, check; again while the checker rejects and turns are left.

    The reward is 1 if the last query returns the gold rows. The checker has a reward of its own, the share of its
    verdicts that were right, which ``right`` annotates one by one.
    """
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    query, verdicts = None, list[float]()
    with closing(open_database(task)) as database:
        for turn in range(MAX_TURNS):
            text = await ask(llms["writer"], "rewrite" if turn else "write", messages, MAX_TOKENS)
            if text == DONE:
                break
            query = text
            _, result = run_query(database, query, hint=task.get("hint", True))
            messages += [{"role": "assistant", "content": query}, {"role": "user", "content": result}]
            accepted = await ask(llms["checker"], "check", messages, VERDICT_TOKENS) == DONE
            verdicts.append(float(accepted == is_correct(task, query)))
            lr.emit_annotation({"right": verdicts[-1]})
            if accepted:
                break
    rewards = {"success": float(query is not None and is_correct(task, query))}
    if verdicts:
        rewards["checker"] = fmean(verdicts)
    lr.emit_reward(rewards, primary_key="success")


async def ask(llm: lr.LLM, agent: str, messages: list[Any], max_tokens: int) -> str:
    """What a policy says, asked by the agent of this name."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key, http_client=connections())
    answer = await client.chat.completions.create(
        model=llm.model,
        messages=messages,
        max_tokens=max_tokens,
        extra_headers={"x-lightning-agent": agent},
    )
    return (answer.choices[0].message.content or "").strip()
