"""The simulated agent of the scale benchmark: no model, but all that a rollout with one leaves behind.

A rollout is three turns of one conversation. Each turn waits as long as the model and the tools would take; then its
model call, with prompts of 300, 600 and 900 token ids (each continues the turn before), 150 sampled ids with logprobs
and weight versions, six messages and some 20 attributes, is appended to the store as a replica does: bundled with
others of the process by ``SharedAppend``, not synced by itself. The reward is a span like any agent's. So there are
four spans a rollout, of about 24 kB as Arrow; token ids and text come from a pool of conversations, all ids of spans
are fresh.

Durations are log-normal: a task's with ``SIGMA_TASK``, those of its rollouts about it with ``SIGMA_ROLLOUT``. Tasks
that are under way when the measurement begins are met at a random moment, as in a run that has been going on for long
(a renewal process in equilibrium), so that ends are spread from the beginning.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.spans import Key, SpanMaker, renamed
from lightning_ray.agent import LitAgent
from lightning_ray.capture.append import SharedAppend
from lightning_ray.store import Store, spans_to_batch
from lightning_ray.types import NamedResources, Rollout

MEAN_SECONDS = 25.0
SIGMA_TASK, SIGMA_ROLLOUT = 0.9, 0.25
"""Of the logarithm: one task in twenty takes 2.9 times the mean or longer, one in a thousand 10.8 times."""
TURNS = 3
NEW_TOKENS = 150
"""Of a prompt that follows on an answer."""
CONVERSATIONS = 48
"""In the pool of a process."""


class Tasks:
    """An endless sequence of tasks, of which the first ``under_way`` began before."""

    def __init__(self, under_way: int, mean_seconds: float = MEAN_SECONDS, seed: int = 0) -> None:
        self._under_way = under_way
        self._mean = mean_seconds
        self._seed = seed

    def take(self, start: int, count: int) -> list[dict[str, float]]:
        """The tasks at positions ``start`` to ``start + count``; ``seconds`` is how long (still) to play one."""
        return [{"position": position, "seconds": self._seconds(position)} for position in range(start, start + count)]

    def _seconds(self, position: int) -> float:
        random = np.random.default_rng([self._seed, position])
        centre = math.log(self._mean) - SIGMA_TASK**2 / 2
        if position >= self._under_way:
            return float(random.lognormal(centre, SIGMA_TASK))
        # What is met at a random moment is the longer the likelier (its length counts once more), and begun.
        return float(random.lognormal(centre + SIGMA_TASK**2, SIGMA_TASK) * random.random())


class SimulatedAgent(LitAgent[dict[str, float]]):
    """Plays as the module tells; ``store`` is where its model calls go."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._replica: Replica | None = None

    async def rollout_async(self, task: dict[str, float], resources: NamedResources, rollout: Rollout) -> float:
        """The reward: 1."""
        if self._replica is None:
            self._replica = Replica(self._store)
        seconds = task["seconds"] * random.lognormvariate(-(SIGMA_ROLLOUT**2) / 2, SIGMA_ROLLOUT)
        key = rollout.rollout_id, rollout.attempt.attempt_id  # type: ignore[attr-defined]
        conversation = random.randrange(CONVERSATIONS)
        for turn in range(TURNS):
            await self._replica.call(key, conversation, turn, seconds / TURNS)
        return 1.0


class Replica:
    """Stands for the replica that answers an agent's calls: waits, and stores what it would have captured."""

    def __init__(self, store: Store, seed: int | None = None) -> None:
        self._store = store
        self._calls = 0
        self._pool = pool(SpanMaker(secrets.randbits(32) if seed is None else seed))
        self._append = SharedAppend(self._store_rows, lambda: self._calls)

    async def call(self, key: Key, conversation: int, turn: int, seconds: float) -> None:
        """One model call; returns when its span is stored, as an answer goes out then."""
        self._calls += 1
        try:
            await asyncio.sleep(seconds)
            await self._append([{"key": key, "row": conversation * TURNS + turn}])
        finally:
            self._calls -= 1

    async def _store_rows(self, rows: list[dict[str, Any]]) -> None:
        batch = self._pool.take(pa.array([row["row"] for row in rows]))
        ids = [secrets.token_hex(8) for _ in rows]
        await self._store.append_spans(renamed(batch, [row["key"] for row in rows], ids), synced=False)


def pool(maker: SpanMaker, conversations: int = CONVERSATIONS) -> pa.RecordBatch:
    """Conversations of ``TURNS`` spans each, one after the other: what a process' model calls are taken from."""
    spans: list[dict[str, Any]] = []
    for _ in range(conversations):
        context = np.zeros(0, np.int32)
        for _ in range(TURNS):
            span = maker.span(("", ""))
            new = 2 * NEW_TOKENS if not len(context) else NEW_TOKENS
            span["prompt_ids"] = np.concatenate([context, span["prompt_ids"][:new]])
            context = np.concatenate([span["prompt_ids"], span["sampled_ids"]])
            spans.append(span)
    return spans_to_batch(spans)
