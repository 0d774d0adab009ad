"""Agents that note down every answer they were given, in a file of their own, as soon as they have it.

A captured call is in the span store before its answer ends. So whatever is noted here must be found there, whoever was
killed meanwhile: the notes are the witness against the store. A line is written by one call of the system, which a
killed runner has either made or not.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

import lightning_ray as lr
from examples.sql.task import DONE, MAX_TOKENS, MAX_TURNS, is_correct, open_database, run_query
from tests.e2e.tiny import WORDS


@cache
def connections() -> DefaultAsyncHttpxClient:
    """One pool for all rollouts of a process."""
    return DefaultAsyncHttpxClient()


@lr.rollout
async def sql(task: dict[str, Any], llm: lr.LLM, rollout: lr.AttemptedRollout) -> float:
    """The SQL example, with a tool that takes its time."""
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    query = None
    with closing(open_database(task)) as database:
        for _ in range(MAX_TURNS):
            text = await ask(task, llm, rollout, messages, MAX_TOKENS)
            if text.strip() == DONE:
                break
            query, (_, result) = text, run_query(database, text)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": result}]
    return float(query is not None and is_correct(task, query))


@lr.rollout
async def words(task: dict[str, Any], llm: lr.LLM, rollout: lr.AttemptedRollout) -> float:
    """Two answers of a few words; the reward is the share of even ones."""
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    said: list[str] = []
    for _ in range(2):
        text = await ask(task, llm, rollout, messages, 8)
        said += text.split()
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "w1 w2"}]
    return sum(word in WORDS[::2] for word in said) / max(1, len(said))


AGENTS = {"sql": sql, "words": words}


async def ask(task: dict[str, Any], llm: lr.LLM, rollout: lr.AttemptedRollout, messages: list[Any], most: int) -> str:
    """The model's answer, noted down; then the tool's ``pause``, in seconds."""
    client = AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key, http_client=connections())
    began = time.time()
    answer = await client.chat.completions.create(
        model=llm.model,
        messages=messages,
        max_tokens=most,
        # A random model says special tokens too; left out of the text, they would break the prefix.
        extra_body={"return_token_ids": True, "skip_special_tokens": False},
    )
    choice: Any = answer.choices[0]
    note = {"attempt": rollout.attempt.attempt_id, "ids": choice.token_ids, "began": began, "mode": rollout.mode}
    write_note(Path(task["notes"]), {"rollout": rollout.rollout_id, **note})
    await asyncio.sleep(task["pause"])
    return choice.message.content or ""


def write_note(folder: Path, note: dict[str, Any]) -> None:
    """Add a line to this process's file."""
    line = json.dumps(note) + "\n"
    with (folder / f"{os.getpid()}.jsonl").open("ab", buffering=0) as file:
        file.write(line.encode())


def read_notes(folder: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """All of the files that were written to since then; ``began`` is when a call was made. Unix seconds."""
    files = [file for file in folder.glob("*.jsonl") if file.stat().st_mtime >= since]
    return [json.loads(line) for file in files for line in file.read_text().split("\n")[:-1]]
