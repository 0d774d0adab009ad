"""Prompts filled by each engine, and errors that say which hole has no value."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.templates import MissingValueError, TemplateError, holes, render, written_holes


def test_a_format_string() -> None:
    prompt = lr.PromptTemplate(template="{task[q]} {n:03d} {{x}}", engine="f-string")
    assert prompt.format(task={"q": "why?"}, n=7, unused=1) == "why? 007 {x}"
    assert lr.PromptTemplate(template="{a}").format(a=1) == "1"


def test_a_jinja_template() -> None:
    prompt = lr.PromptTemplate(template="{% for m in ms %}{{ m.role }}: {{ m.text }}\n{% endfor %}", engine="jinja")
    assert prompt.format(ms=[{"role": "a", "text": "<x>"}, {"role": "b", "text": "y"}]) == "a: <x>\nb: y\n"


@pytest.mark.parametrize(("engine", "template"), [("f-string", "{missing}"), ("jinja", "{{ missing }}")])
def test_a_hole_without_a_value_is_named(engine: str, template: str) -> None:
    with pytest.raises(MissingValueError, match=r"missing.*given are \['there'\]") as error:
        render(engine, template, {"there": 1})
    assert isinstance(error.value, KeyError) and not str(error.value).startswith('"')


@pytest.mark.parametrize(
    ("engine", "template"),
    [("f-string", "{"), ("f-string", "{}"), ("jinja", "{% if %}"), ("jinja", "{{ ''.__class__.__mro__ }}")],
)
def test_a_malformed_template_is_refused(engine: str, template: str) -> None:
    with pytest.raises(TemplateError, match="the prompt is no"):
        render(engine, template, {})


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(lr.ConfigError, match=r"'mustache' is unknown; use one of \['f-string', 'jinja', 'poml'\]"):
        render("mustache", "", {})


def test_poml_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "poml", None)
    with pytest.raises(lr.ConfigError, match=r"pip install 'lightning-ray\[poml\]'"):
        lr.PromptTemplate(template="<p>x</p>", engine="poml").format()


def test_poml_is_given_the_values_and_gives_text(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [{"messages": "text"}, {"messages": [{"type": "image"}]}, RuntimeError("return code 1")]

    def poml(markup: str, context: dict[str, Any], **settings: Any) -> Any:
        assert (markup, context, settings) == ("<p>{{x}}</p>", {"x": 1}, {"chat": False, "format": "dict"})
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, "poml", types.SimpleNamespace(poml=poml))  # type: ignore[arg-type]
    prompt = lr.PromptTemplate(template="<p>{{x}}</p>", engine="poml")
    assert prompt.format(x=1) == "text"
    with pytest.raises(TemplateError, match="more than text"):
        prompt.format(x=1)
    with pytest.raises(TemplateError, match="cannot be rendered as POML: return code 1"):
        prompt.format(x=1)
    with pytest.raises(TemplateError, match="it has no tag: '/some/file'"):
        render("poml", "/some/file", {})


def test_poml_itself() -> None:
    pytest.importorskip("poml")
    assert "Say hi" in render("poml", "<poml><task>Say {{x}}</task></poml>", {"x": "hi"})


@pytest.mark.parametrize(
    ("engine", "template", "names", "written"),
    [
        ("f-string", "{b} {a[x]:>{w}} {{c}} {b}", {"a", "b", "w"}, ["{b}", "{a[x]}"]),
        ("jinja", "{% for x in b %}{{ x }}{{ a.c }}{% endfor %}", {"a", "b"}, ["{{ a }}", "{{ b }}"]),
        ("poml", "<p>{{ a }} {{b.c}}</p>", {"a", "b"}, ["{{ a }}", "{{ b }}"]),
    ],
)
def test_the_holes_of_a_template(engine: str, template: str, names: set[str], written: list[str]) -> None:
    assert holes(engine, template) == names and written_holes(engine, template) == written


@pytest.mark.parametrize(("engine", "template"), [("f-string", "{}"), ("f-string", "{a"), ("jinja", "{{ a")])
def test_holes_of_what_is_no_template(engine: str, template: str) -> None:
    with pytest.raises(TemplateError):
        holes(engine, template)
