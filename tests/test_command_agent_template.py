"""Templates: what placeholders mean, and what is said of those that mean nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import BaseModel

import lightning_ray as lr
from lightning_ray.programs.template import Template, as_text


@dataclasses.dataclass
class Row:
    id: int
    name: str


class Question(BaseModel):
    text: str
    rows: list[int] = []


VALUES: dict[str, Any] = {
    "task": {
        "question": "Wie?",
        "n": 3,
        "rows": [{"id": 7}, {"id": 8}],
        "own": Row(1, "a"),
        "model": Question(text="q"),
    },
    "task_file": "/folder/task.json",
    "llm": lr.LLM(endpoint="http://host/v1", model="m"),
    "prompt_template": None,
    "rollout_id": "ro-1",
    "attempt_id": "at-1",
}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("plain", "plain"),
        ("", ""),
        ("{task.question}", "Wie?"),
        ("--n={task.n}!", "--n=3!"),
        ("{task.rows[1].id}{task.rows[-1].id}", "88"),
        ("{task[rows]}", '[{"id": 7}, {"id": 8}]'),
        ("{task.own.name}{task.own}", 'a{"id": 1, "name": "a"}'),
        ("{task.model.text}{task.model}", 'q{"text": "q", "rows": []}'),
        ("{llm.endpoint} {llm.model}", "http://host/v1 m"),
        ("{task_file}", "/folder/task.json"),
        ("{rollout_id}/{attempt_id}", "ro-1/at-1"),
        ('{{"a": {task.n}}}', '{"a": 3}'),
    ],
)
def test_placeholders_are_filled_in(text: str, filled: str) -> None:
    assert Template(text, "argument 0").fill(VALUES) == filled


@pytest.mark.parametrize(
    ("task", "text"), [("as it is", "as it is"), (1.5, "1.5"), (None, "null"), ({"ü": 1}, '{"ü": 1}')]
)
def test_a_whole_task_is_itself_or_json(task: Any, text: str) -> None:
    assert Template("{task}", "stdin").fill({**VALUES, "task": task}) == text == as_text(task)


def test_only_text_without_placeholders_is_literal() -> None:
    assert Template("a{{b", "x").literal == "a{b" and Template("{task}", "x").literal is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{question}", r"argument 1 '\{question\}' has the placeholder \{question\}; there are task, task_file, llm"),
        ('{"a": 1}', "a brace that is meant as one is doubled"),
        ("{task.}", "has the placeholder"),
        ("{}", "has the placeholder"),
        ("{task!r}", "has the placeholder"),
        ("{task:>10}", "has the placeholder"),
        ("{llm}", r"of llm there are \{llm.endpoint\}"),
        ("{llm.temperature}", "of llm there are"),
        ("{rollout_id.x}", r"\{rollout_id\} is text"),
        ("{task", "a brace that is meant as one is doubled"),
        ("task}", "a brace that is meant as one is doubled"),
        (3, "argument 1 is int 3; it must be text"),
    ],
)
def test_what_cannot_be_is_refused_when_the_agent_is_made(text: Any, said: str) -> None:
    with pytest.raises(lr.AgentError, match=said):
        Template(text, "argument 1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{task.answer}",
            r"needs task.answer, but task has no 'answer': it has \['model', 'n', 'own', 'question', 'rows'\]",
        ),
        ("{task.rows[2].id}", "task.rows has no '2': it is a list of 2"),
        ("{task.rows.x}", "task.rows has no 'x'"),
        ("{task.n.x}", "task.n has no 'x': it is int 3"),
        ("{task.own.age}", r"it is a Row with \['id', 'name'\]"),
        ("{task.own.__class__}", "has no '__class__'"),
        ("{prompt_template}", "but the rollout's resources have none"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(text: str, said: str) -> None:
    with pytest.raises(lr.AgentError, match=said):
        Template(text, "argument 1").fill(VALUES)


def test_a_shell_gets_each_value_as_one_word() -> None:
    values = {**VALUES, "task": "a; rm -rf 'x'"}
    assert Template("echo {task} >&2", "argument 0").fill(values, quote=True) == "echo 'a; rm -rf '\"'\"'x'\"'\"'' >&2"
