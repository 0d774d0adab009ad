"""The policy before reinforcement learning: a new model taught the format of the task by demonstrations.

Only what the assistant says, its end tokens included, is learned. Invariant: nothing but train questions is
ever seen, the gate included. Weights and tokenizer end in one folder in the Hugging Face format.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from examples.sql.demonstrations import Conversation, demonstrate
from examples.sql.model import END, START, make_model, make_tokenizer, save_policy
from examples.sql.task import SYNONYMS, Question, Task, make_tasks, open_database, run_query

Progress = Callable[[int, int, float], None]

IGNORED = -100
RAMP_STEPS = 20
ATTEMPTS = 3
WRONG_NAMES = 0.10


def warm_start(
    folder: Path,
    seed: int,
    steps: int = 400,
    batch: int = 32,
    lr: float = 4e-3,
    hint: bool = True,
    on_progress: Progress | None = None,
) -> None:
    """Make the policy in `folder`; `on_progress(step, steps, loss)`.

    A model that has not learned to copy the columns it was told is thrown away, and the next one starts from
    other weights and demonstrations. RuntimeError after three of them.
    """
    tasks, _, _ = make_tasks(seed)
    tokenizer = make_tokenizer()
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"demonstrations {seed} {attempt}")
        model = make_model(ATTEMPTS * seed + attempt)
        _train(model, _batches(tokenizer, tasks, rng, steps, batch, hint), steps, lr, on_progress)
        if not hint or wrong_name_share(model, tokenizer, tasks) <= WRONG_NAMES:
            return save_policy(model, tokenizer, folder)
    raise RuntimeError(f"{ATTEMPTS} warm starts do not copy the columns they are told; raise steps, now {steps}")


def wrong_name_share(model: Any, tokenizer: Any, tasks: list[Task]) -> float:
    """How often, told the columns after an error, the model would name one that is not there (0 to 1).

    The probability of a synonym that the database does not have, among all synonyms, at the place of the
    column in the right query; the mean over the tasks whose column is renamed.
    """
    import torch

    names = [name for group in SYNONYMS.values() for name in group]
    ids = tokenizer.convert_tokens_to_ids(names)
    shares = []
    for task in tasks:
        if task["gold_sql"] == _blind(task):
            continue
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(_corrected(tokenizer, task)).input_ids])).logits[0, -1]
        there = torch.tensor([name in task["columns"] for name in names])
        shares.append(logits[ids].softmax(-1)[~there].sum().item())
    return sum(shares) / len(shares)


def _blind(task: Task) -> str:
    """The right query, but for the column, which is called what the question calls it."""
    return Question(**task["form"]).sql(task["form"]["concept"])


def _corrected(tokenizer: Any, task: Task) -> str:
    """The conversation of a failing first query, up to the column's place in the right second one."""
    with closing(open_database(task)) as conn:
        _, answer = run_query(conn, _blind(task))
    messages = [
        {"role": "user", "content": task["question"]},
        {"role": "assistant", "content": _blind(task)},
        {"role": "user", "content": answer},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    column = task["concepts"][task["form"]["concept"]]
    return prompt + task["gold_sql"].split(f" {column} ")[0]


def _batches(
    tokenizer: Any, tasks: list[Task], rng: random.Random, steps: int, batch: int, hint: bool
) -> Iterator[tuple[Any, Any]]:
    """Token ids and labels, both [batch, longest], padded on the right."""
    import torch

    each = math.ceil(steps * batch / len(tasks))
    talks = [talk for task in tasks for talk in demonstrate(task, each, rng, hint=hint)]
    rng.shuffle(talks)
    for first in range(0, steps * batch, batch):
        rows = [_encode(tokenizer, talk) for talk in talks[first : first + batch]]
        length = max(len(ids) for ids, _ in rows)
        ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row, _ in rows]
        labels = [row + [IGNORED] * (length - len(row)) for _, row in rows]
        yield torch.tensor(ids), torch.tensor(labels)


def _encode(tokenizer: Any, talk: Conversation) -> tuple[list[int], list[int]]:
    """Token ids, and the same ids with everything that the assistant did not say replaced by IGNORED."""
    ids = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False)).input_ids
    start, end, assistant = tokenizer.convert_tokens_to_ids([START, END, "assistant"])
    labels, spoken = [], False
    for before, token in zip([None, *ids[:-1]], ids, strict=True):
        labels.append(token if spoken else IGNORED)
        spoken = token != end and (spoken or (before, token) == (start, assistant))
    return ids, labels


def _train(model: Any, batches: Iterator[tuple[Any, Any]], steps: int, lr: float, report: Progress | None) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / RAMP_STEPS, 1 - step / steps))
    for step, (ids, labels) in enumerate(batches, start=1):
        targets = labels[:, 1:]
        spoken = targets != IGNORED
        hidden = model.model(ids[:, :-1]).last_hidden_state[spoken]
        loss = cross_entropy(model.lm_head(hidden), targets[spoken])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report:
            report(step, steps, loss.item())
