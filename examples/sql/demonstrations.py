"""Conversations of a demonstrator that writes queries well, aims carelessly and takes correction badly.

It is worse after an error than before one on purpose: a model that learns from it starts with room for
reinforcement learning to show something. Its weaknesses are the constants below; it solves two tasks in five.
The tool's answers are real. How a conversation becomes tokens is left to the warm start.
"""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import replace

from examples.sql.task import (
    AGGREGATES,
    COMPARISONS,
    DONE,
    MAX_TURNS,
    ORDERS,
    SYNONYMS,
    Question,
    Task,
    open_database,
    run_query,
)

REDRAW_AGGREGATE = 0.5
WRONG_DIRECTION = 0.35
REDRAW_CONCEPT = 0.10
GIVE_UP = 0.36
REPEAT = 0.38

Conversation = list[dict[str, str]]


def demonstrate(task: Task, count: int, rng: random.Random, *, hint: bool = True) -> list[Conversation]:
    """`count` conversations on a task: chat messages, the tool's answers sent by the role "user"."""
    with closing(open_database(task)) as conn:
        return [_converse(task, conn, rng, hint) for _ in range(count)]


def _converse(task: Task, conn: sqlite3.Connection, rng: random.Random, hint: bool) -> Conversation:
    aim = _aim(Question(**task["form"]), rng)
    said = aim.sql(aim.concept)
    messages = [{"role": "user", "content": task["question"]}, {"role": "assistant", "content": said}]
    for _ in range(MAX_TURNS - 1):
        rows, answer = run_query(conn, said, hint=hint)
        if rows is None:
            said = _after_error(said, aim, task["concepts"][aim.concept], rng)
        else:
            said = DONE
        messages += [{"role": "user", "content": answer}, {"role": "assistant", "content": said}]
        if said == DONE:
            break
    return messages


def _aim(question: Question, rng: random.Random) -> Question:
    """The question as the demonstrator understood it."""
    if rng.random() < REDRAW_CONCEPT:
        concept = rng.choice(list(SYNONYMS))
        question = replace(question, concept=concept)
    if question.kind == "aggregate":
        if rng.random() < REDRAW_AGGREGATE:
            question = replace(question, word=rng.choice(list(AGGREGATES)))
    elif rng.random() < WRONG_DIRECTION:
        words = list(COMPARISONS if question.kind == "count" else ORDERS)
        question = replace(question, word=words[1 - words.index(question.word)])
    return question


def _after_error(said: str, aim: Question, column: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < GIVE_UP:
        return DONE
    return said if draw < GIVE_UP + REPEAT else aim.sql(column)
