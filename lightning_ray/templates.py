"""How a prompt's holes are filled: Python's format strings, Jinja, or POML. What a prompt is, is ``types``'s.

Jinja is sandboxed, as prompts may be written by a model. POML evaluates JavaScript in a Node process of its own, about
half a second for each rendering: it is for templates that are trusted, and best filled outside of an event loop.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from lightning_ray.errors import ConfigError, LightningRayError


class TemplateError(LightningRayError, ValueError):
    """A template is malformed, or cannot be filled."""


class MissingValueError(TemplateError, KeyError):
    """A hole was given no value. A KeyError too, as ``str.format`` raises."""

    def __str__(self) -> str:
        return str(self.args[0])


def render(engine: str, template: str, values: Mapping[str, Any]) -> str:
    """The template with its holes filled.

    Raises MissingValueError for a hole without a value, TemplateError for a malformed template, ConfigError for an
    engine that is unknown or not installed.
    """
    if engine not in ENGINES:
        raise ConfigError(f"prompt template engine {engine!r} is unknown; use one of {sorted(ENGINES)}")
    return ENGINES[engine](template, values)


def holes(engine: str, template: str) -> frozenset[str]:
    """The names that a template wants values for; of POML those that stand first in ``{{ }}``.

    Raises TemplateError for a malformed template or a hole without a name, ConfigError for an unknown engine.
    """
    if engine not in ENGINES:
        raise ConfigError(f"prompt template engine {engine!r} is unknown; use one of {sorted(ENGINES)}")
    return _HOLES[engine](template)


def hole(engine: str, name: str) -> str:
    """How a hole is written."""
    return f"{{{name}}}" if engine == "f-string" else f"{{{{ {name} }}}}"


def written_holes(engine: str, template: str) -> list[str]:
    """The holes of a template in their order, as it has them: ``{task[question]}``. Raises as ``holes``."""
    if engine != "f-string":
        return [hole(engine, name) for name in sorted(holes(engine, template))]
    holes(engine, template)
    return list(dict.fromkeys(f"{{{name}}}" for _, name, _, _ in string.Formatter().parse(template) if name))


def _format_holes(template: str) -> frozenset[str]:
    found: set[str] = set()
    try:
        for _, name, spec, _ in string.Formatter().parse(template):
            if name is None:
                continue
            if not (root := re.split(r"[.\[]", name)[0]).isidentifier():
                raise TemplateError(f"the prompt has a hole {{{name}}} that is no name; write {{{{ and }}}} for braces")
            found |= {root, *(_format_holes(spec) if spec else ())}
    except ValueError as error:
        if isinstance(error, TemplateError):
            raise
        raise TemplateError(
            f"the prompt is no format string: {error}; write {{{{ and }}}} for braces that are no hole"
        ) from error
    return frozenset(found)


def _jinja_holes(template: str) -> frozenset[str]:
    import jinja2
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return frozenset(meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(template)))
    except jinja2.TemplateError as error:
        raise TemplateError(f"the prompt is no Jinja template: {error}") from error


def _poml_holes(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\{\{\s*([A-Za-z_]\w*)", template))


def _format(template: str, values: Mapping[str, Any]) -> str:
    try:
        return template.format(**values)
    except KeyError as error:
        raise MissingValueError(
            f"the prompt's hole {{{error.args[0]}}} has no value; given are {sorted(values)}; write {{{{ and }}}} "
            "for braces that are no hole"
        ) from error
    except (ValueError, IndexError) as error:
        raise TemplateError(
            f"the prompt is no format string: {error}; write {{{{ and }}}} for braces that are no hole"
        ) from error


def _jinja(template: str, values: Mapping[str, Any]) -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(template).render(**values)
    except jinja2.UndefinedError as error:
        raise MissingValueError(f"the prompt's hole has no value: {error}; given are {sorted(values)}") from error
    except jinja2.TemplateError as error:
        raise TemplateError(f"the prompt is no Jinja template, or not allowed to do this: {error}") from error


def _poml(template: str, values: Mapping[str, Any]) -> str:
    try:
        from poml import poml
    except ImportError as error:
        raise ConfigError(
            "prompt templates of engine 'poml' need the package poml: pip install 'lightning-ray[poml]'"
        ) from error
    if "<" not in template:  # poml would take it for the path of a file
        raise TemplateError(f"the prompt is no POML, it has no tag: {template!r:.80}")
    try:
        rendered = poml(template, context=dict(values), chat=False, format="dict")
    except RuntimeError as error:
        raise TemplateError(f"the prompt cannot be rendered as POML: {error}") from error
    messages = rendered["messages"] if isinstance(rendered, dict) else rendered
    if not isinstance(messages, str):
        raise TemplateError("the prompt is POML with more than text; PromptTemplate.format gives text only")
    return messages


ENGINES: dict[str, Callable[[str, Mapping[str, Any]], str]] = {"f-string": _format, "jinja": _jinja, "poml": _poml}
_HOLES: dict[str, Callable[[str], frozenset[str]]] = {
    "f-string": _format_holes,
    "jinja": _jinja_holes,
    "poml": _poml_holes,
}
