"""A task for prompt searches on which everything is known: a clerk with a house style that its prompt does not tell.

The clerk stands in for a frozen model: it copies the fields that a task asks for and follows the sentences "Write the
FIELD HOW." of its prompt, nothing else; of two about a field the last. The house style, drawn by the seed, has one of
ten ways for each of ten fields, so that there are 100 sentences and the oracle's prompt has ten of them. The reward is
the share of fields that are as the style has them; the grader notes what it wanted instead, as real graders do.

The optimising models are scripted stand-ins behind a real HTTP endpoint, with the same edits: one sentence put in, in
place of an older one about that field. One reads a failure in what its critique was shown and infers the sentence, and
in a quarter of the cases errs and takes any; the other takes any always. A merge has the sentences of both.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import lightning_ray as lr
from tests.scripted_model import kind_of, part

FIELDS = ("name", "city", "street", "firm", "product", "colour", "remark", "carrier", "branch", "contact")
WAYS: dict[str, Callable[[str], str]] = {
    "in capitals": str.upper,
    "in small letters": str.lower,
    "in quotation marks": lambda text: f'"{text}"',
    "in square brackets": lambda text: f"[{text}]",
    "with dashes for spaces": lambda text: text.replace(" ", "-"),
    "with underscores for spaces": lambda text: text.replace(" ", "_"),
    "without spaces": lambda text: text.replace(" ", ""),
    "back to front": lambda text: text[::-1],
    "as initials": lambda text: "".join(word[0] for word in text.split()),
    "with a full stop": lambda text: f"{text}.",
}
WORDS = ("Amber", "Birch", "Coral", "Delta", "Ember", "Fjord", "Grove", "Haven", "Ivory", "Jetty", "Knoll", "Lotus")
ASKED = 3
"""Fields that a task asks for."""
SEED = "Copy the fields of {record}."
ERRS = 0.25
_RULE = re.compile(r"Write the (\w+) ([a-z ]+)\.")
_NOTE = re.compile(r"(\w+) \((.*)\): wrote (.*), wanted (.*)")


def sentence(field: str, way: str) -> str:
    """What the clerk follows."""
    return f"Write the {field} {way}."


def house_style(seed: int) -> dict[str, str]:
    """Field -> way."""
    rng = random.Random(f"style {seed}")
    return {field: rng.choice(list(WAYS)) for field in FIELDS}


def make_tasks(seed: int, count: int) -> list[dict[str, Any]]:
    """Tasks without a record twice: slices of them are disjoint."""
    rng, style, tasks = random.Random(f"tasks {seed}"), house_style(seed), dict[str, dict[str, Any]]()
    while len(tasks) < count:
        record = {field: " ".join(rng.sample(WORDS, 2)) for field in rng.sample(FIELDS, ASKED)}
        wanted = {field: WAYS[style[field]](value) for field, value in record.items()}
        tasks.setdefault(json.dumps(record), {"record": record, "wanted": wanted})
    return list(tasks.values())


def oracle(seed: int) -> str:
    """The prompt that tells the whole style."""
    return " ".join([SEED, *(sentence(field, way) for field, way in house_style(seed).items())])


def write(template: str, record: dict[str, str]) -> dict[str, str]:
    """What the clerk makes of a record under a prompt."""
    told = {field: way for field, way in _RULE.findall(template) if way in WAYS}
    return {field: WAYS[told[field]](value) if field in told else value for field, value in record.items()}


def score(template: str, tasks: list[dict[str, Any]]) -> float:
    """The mean reward of a prompt."""
    shares = []
    for task in tasks:
        written = write(template, task["record"])
        shares.append(sum(written[field] == wanted for field, wanted in task["wanted"].items()) / ASKED)
    return sum(shares) / len(shares)


@lr.rollout
async def clerk(task: dict[str, Any], prompt_template: lr.PromptTemplate) -> float:
    """Writes a record, and notes what the grader wanted where it was something else."""
    written = write(prompt_template.template, task["record"])
    right = 0
    for field, wanted in task["wanted"].items():
        right += written[field] == wanted
        if written[field] != wanted:
            lr.emit_message(f"{field} ({task['record'][field]}): wrote {written[field]}, wanted {wanted}")
    return right / ASKED


class StandIn:
    """An optimising model by script; ``reads`` is whether it looks at what it is shown."""

    def __init__(self, seed: int, reads: bool):
        self._rng = random.Random(f"stand-in {seed} {reads}")
        self._reads = reads

    def __call__(self, body: dict[str, Any]) -> str:
        """One answer."""
        question = body["messages"][0]["content"]
        if kind_of(body) == "critique":
            return self._critique(question)
        if kind_of(body) == "merge":
            told = dict(_RULE.findall(part(question, "second"))) | dict(_RULE.findall(part(question, "first")))
            return f"<template>\n{' '.join([SEED, *(sentence(*rule) for rule in told.items())])}\n</template>"
        rule = _RULE.search(part(question, "review"))
        assert rule is not None
        kept = re.sub(rf" ?Write the {rule[1]} [a-z ]+\.", "", part(question, "instructions"))
        return f"<template>\n{kept} {rule[0]}\n</template>"

    def _critique(self, question: str) -> str:
        failures = _NOTE.findall(question)
        if not self._reads or not failures or self._rng.random() < ERRS:
            return sentence(self._rng.choice(FIELDS), self._rng.choice(list(WAYS)))
        field, value, _, wanted = self._rng.choice(failures)
        return sentence(field, next(way for way, how in WAYS.items() if how(value) == wanted))
