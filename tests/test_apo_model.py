"""What a prompt search asks its optimising model, and what it takes of the answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import lightning_ray as lr
from lightning_ray.algorithms.apo.writer import template_in, what_is_wrong
from lightning_ray.errors import InfrastructureError
from tests.apo_parts import SEED, SMALL, TRAIN, VAL, search, state_of
from tests.scripted_model import ScriptedModel, kind_of, wishes


async def test_a_critique_sees_what_was_said_noted_and_rewarded(tmp_path: Path) -> None:
    def talking(body: dict[str, Any]) -> str:
        return "I would say five" if kind_of(body) == "other" else wishes(body)  # type: ignore[return-value]

    with ScriptedModel(talking) as model:

        @lr.rollout
        def asker(task: str, prompt_template: lr.PromptTemplate) -> float:
            client = OpenAI(base_url=model.url, api_key="none", max_retries=0)
            message: Any = {"role": "user", "content": prompt_template.format(task=task)}
            client.chat.completions.create(model="agent", messages=[message])
            lr.emit_annotation({"grader": "too vague"})
            lr.emit_reward({"right": 0.25, "short": 0.75}, primary_key="right")
            if task == "fall":
                raise KeyError("the table is gone")
            return 0.25

        for show in (True, False):
            apo = lr.APO[str](model.client(), beam_rounds=1, show_errors=show, **SMALL)
            await search(tmp_path / str(show), apo, ["fall"], ["stand"], asker)
            question = model.asked("critique")[-1]
            assert "user: Do fall" in question and "assistant: I would say five" in question
            assert "grader: too vague" in question and "right 0.25, short 0.75" in question
            assert ("KeyError: 'the table is gone'" in question) == show
    assert state_of(apo).seed_score == 0.25


async def test_tasks_and_long_talk_may_be_kept_from_critiques(tmp_path: Path) -> None:
    with ScriptedModel(lambda body: "x" * 5000 if kind_of(body) == "other" else wishes(body)) as model:

        @lr.rollout
        def asker(task: str, prompt_template: lr.PromptTemplate) -> float:
            client = OpenAI(base_url=model.url, api_key="none", max_retries=0)
            client.chat.completions.create(model="agent", messages=[{"role": "user", "content": "hello"}])
            return 0.5

        apo = lr.APO[str](model.client(), beam_rounds=1, show_tasks=False, max_run_characters=200, **SMALL)
        await search(tmp_path, apo, ["gold"], ["gold"], asker)
    question = model.asked("critique")[0]
    assert "gold" not in question and "user: hello" in question
    assert "x" * 100 in question and "x" * 101 not in question and "characters left out" in question


@pytest.mark.parametrize(
    ("engine", "before", "after", "wrong"),
    [
        ("f-string", "{a} {b}", "{a}", r"it lost \{b\}"),
        ("f-string", "{a}", "{a} {c[x]}", r"nothing fills in \{c\}"),
        ("f-string", "{a}", '{a} {"x": 1}', "no name"),
        ("f-string", "{a}", "{a} {", "no format string"),
        ("f-string", "{a}", "{a} {{x}}", None),
        ("f-string", "{a.b}", "{a[0]:>{w}}", r"nothing fills in \{w\}"),
        ("jinja", "{{ a }}", "{% for x in a %}{{ x }}{% endfor %}", None),
        ("jinja", "{{ a }}", "{{ b }}", r"it lost \{\{ a \}\}"),
        ("jinja", "{{ a }}", "{{ a", "no Jinja"),
        ("poml", "<p>{{ a }}</p>", "<p>b</p>", "it lost"),
        ("f-string", "{a}", "{a}", "changes nothing"),
        ("f-string", "{a}", " ", "empty"),
    ],
)
def test_what_cannot_stand_in_for_a_template(engine: Any, before: str, after: str, wrong: str | None) -> None:
    found = what_is_wrong(after, lr.PromptTemplate(template=before, engine=engine), [before])
    if wrong is None:
        assert found is None
    else:
        assert found is not None and re.search(wrong, found)


@pytest.mark.parametrize(
    ("answer", "template"),
    [
        ("Sure.\n<template>\na {b}\n</template>\nDone", "a {b}"),
        ("<template>x</template> no, <template>\ny\nz\n</template>", "y\nz"),
        ("```text\na\nb\n```", "a\nb"),
        ("a `b` c", "a `b` c"),
    ],
)
def test_the_template_in_an_answer(answer: str, template: str) -> None:
    assert template_in(answer) == template


async def test_an_edit_that_loses_a_placeholder_is_refused_and_asked_for_again(tmp_path: Path) -> None:
    def forgetful(body: dict[str, Any]) -> str | int:
        if kind_of(body) == "edit" and len(body["messages"]) == 1:
            return "Do it well"
        if kind_of(body) == "edit":
            assert "{task}" in body["messages"][-1]["content"], "it is told what is missing"
            return "Do {task} with red"
        return "go on"

    with ScriptedModel(forgetful) as model:
        apo = lr.APO[str](model.client(), beam_rounds=1, **SMALL)
        await search(tmp_path / "again", apo, TRAIN, ["red"])
        assert apo.get_best_prompt().template == "Do {task} with red"
        assert [c.version for c in state_of(apo).candidates.values()] == ["v0", "v1"], "the same edit is one candidate"
        apo = lr.APO[str](model.client(), beam_rounds=1, edit_attempts=1, **SMALL)
        await search(tmp_path / "never", apo, TRAIN, VAL)
        assert list(state_of(apo).candidates) == ["v0"] and state_of(apo).round == 1


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (500, InfrastructureError, "could not be asked .500."),
        (401, lr.ConfigError, "refused model 'gpt-5-mini' .401..*gradient_model"),
        (404, lr.ConfigError, "refused model 'gpt-5-mini' .404."),
    ],
)
async def test_a_model_that_does_not_answer_ends_the_run_by_name(
    status: int, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with ScriptedModel(lambda body: status) as model:
        apo = lr.APO[str](model.client(), **SMALL)
        with pytest.raises(error, match=words):
            await search(tmp_path, apo, TRAIN, VAL)
    assert apo.get_best_prompt() == SEED["prompt_template"]


async def test_some_calls_may_fail(tmp_path: Path) -> None:
    with ScriptedModel(lambda body: 500 if len(model.bodies) % 3 == 1 else wishes(body)) as model:
        apo = lr.APO[str](model.client(), beam_rounds=4, **SMALL)
        await search(tmp_path, apo, TRAIN, VAL)
    assert state_of(apo).best_score > 0.5


async def test_at_the_cap_of_the_spend_the_search_ends_with_the_best_so_far(tmp_path: Path) -> None:
    with ScriptedModel(lambda body: 402 if len(model.bodies) > 12 else wishes(body)) as model:
        apo = lr.APO[str](model.client(), beam_rounds=9, **SMALL)
        await search(tmp_path, apo, TRAIN, VAL)
    state = state_of(apo)
    assert "may cost no more" in state.stopped and "scripted 402" in state.stopped
    assert 0 < state.round < 9 and state.best_score > 0.0 and state.best != "v0"
    assert len(model.bodies) <= 12 + SMALL["beam_width"] * SMALL["branch_factor"], "nothing is asked after the refusal"


async def test_files_of_ones_own_are_asked(tmp_path: Path) -> None:
    critique, edit = tmp_path / "c.txt", tmp_path / "e.txt"
    critique.write_text("Judge {{ template }} by {% for run in runs %}[{{ run.reward }}]{% endfor %}")
    edit.write_text("Mend {{ template }} by {{ critique }}, keep {{ placeholders[0] }}")
    with ScriptedModel(lambda body: "Do {task} red") as model:
        apo = lr.APO[str](
            model.client(),
            beam_rounds=1,
            gradient_prompt_files=[critique],
            apply_edit_prompt_files=[edit],
            **SMALL,
        )
        await search(tmp_path / "run", apo, ["red", "red"], VAL)
    questions = {body["messages"][0]["content"] for body in model.bodies}
    assert questions == {"Judge Do {task} by [0][0]", "Mend Do {task} by Do {task} red, keep {task}"}
