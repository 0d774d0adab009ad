"""Critique, edit, merge: what the optimising model is asked for, and what of its answers becomes a template.

An answer that loses a placeholder, adds one that nobody fills, or changes nothing is refused: the model is told why and
asked again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.apo.optimizer import Optimizer
from lightning_ray.algorithms.apo.prompt_files import PromptFile
from lightning_ray.templates import TemplateError, hole, holes, written_holes
from lightning_ray.types import PromptTemplate

if TYPE_CHECKING:
    from lightning_ray.algorithms.apo.settings import APO

_MARKED = re.compile(r"<template>\n?(.*?)\n?</template>", re.DOTALL)
_FENCED = re.compile(r"\A```[^\n]*\n(.*?)\n?```\Z", re.DOTALL)

Templates = Mapping[str, PromptTemplate]


class NoEdit(Exception):
    """The model gave nothing that can be used; the message says what was wrong last."""


class Writer:
    """Asks one model for critiques and another for edits and merges."""

    def __init__(self, optimizer: Optimizer, settings: APO[Any]):
        self._optimizer = optimizer
        self._settings = settings

    async def critique(self, file: PromptFile, templates: Templates, name: str, runs: Sequence[dict[str, Any]]) -> str:
        """What is wrong with one of the templates, seen from these runs. Raises NoEdit for an empty answer."""
        question = file.render(**fields(templates, name), runs=runs)
        answer = await self._optimizer.ask(self._settings.gradient_model, [said("user", question)])
        if not answer:
            raise NoEdit(f"model {self._settings.gradient_model!r} gave an empty critique")
        return answer

    async def edit(self, file: PromptFile, templates: Templates, name: str, critique: str) -> PromptTemplate:
        """One of the templates, edited. Raises NoEdit after ``edit_attempts`` answers of no use."""
        question = file.render(**fields(templates, name), critique=critique)
        return await self._template(question, templates[name], [templates[name].template])

    async def merge(
        self, file: PromptFile, first: Templates, second: Templates, ancestor: Templates, name: str
    ) -> PromptTemplate:
        """One template of two. Raises NoEdit as ``edit``."""
        texts = [each[name].template for each in (first, second, ancestor)]
        question = file.render(**fields(first, name), first=texts[0], second=texts[1], ancestor=texts[2])
        return await self._template(question, first[name], texts)

    async def _template(self, question: str, before: PromptTemplate, known: Sequence[str]) -> PromptTemplate:
        talk = [said("user", question)]
        wrong = None
        for _ in range(self._settings.edit_attempts):
            answer = await self._optimizer.ask(self._settings.apply_edit_model, talk)
            text = template_in(answer)
            wrong = what_is_wrong(text, before, known)
            if wrong is None:
                return before.model_copy(update={"template": text})
            talk += [
                said("assistant", answer or "(nothing)"),
                said("user", f"This cannot be used: {wrong}. Try again."),
            ]
        raise NoEdit(f"{self._settings.edit_attempts} edits were refused, the last one because {wrong}")


def fields(templates: Templates, name: str) -> dict[str, Any]:
    """What every prompt file has of the templates."""
    template = templates[name]
    return {
        "name": name,
        "several": len(templates) > 1,
        "template": template.template,
        "engine": template.engine,
        "placeholders": written_holes(template.engine, template.template),
        "others": {other: each.template for other, each in templates.items() if other != name},
    }


def template_in(answer: str) -> str:
    """The template in an answer: what is marked last, otherwise all of it, out of its code fence."""
    if marked := _MARKED.findall(answer):
        return str(marked[-1])
    fenced = _FENCED.match(answer)
    return fenced[1] if fenced else answer


def what_is_wrong(text: str, before: PromptTemplate, known: Sequence[str]) -> str | None:
    """Why a text cannot stand in for a template; None if it can."""
    if not text.strip():
        return "it is empty"
    if text in known:
        return "it changes nothing"
    try:
        wanted, found = holes(before.engine, before.template), holes(before.engine, text)
    except TemplateError as error:
        return str(error)
    if lost := wanted - found:
        return f"it lost {', '.join(hole(before.engine, name) for name in sorted(lost))}"
    if added := found - wanted:
        return f"nothing fills in {', '.join(hole(before.engine, name) for name in sorted(added))}"
    return None


def said(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}
