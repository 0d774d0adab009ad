"""Templates of arguments and variables: ``{task.question}``, ``{task[0].id}``, ``{llm.model}``; ``{{`` is a brace.

Placeholders name keys or attributes and compute nothing. What is no text becomes JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from lightning_ray.errors import AgentError

ROOTS = ("task", "task_file", "llm", "prompt_template", "rollout_id", "attempt_id")
LLM_FIELDS = ("endpoint", "model", "api_key")
_PLACEHOLDER = re.compile(r"^([^.\[\]]+)((?:\.[^.\[\]]+|\[[^\[\]]+\])*)$")
_STEP = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]+)\]")


class Template:
    """One argument or variable; ``where`` says which in messages.

    Raises AgentError for braces that do not match and placeholders that do not exist.
    """

    def __init__(self, text: str, where: str):
        if not isinstance(text, str):
            raise AgentError(f"{where} is {type(text).__name__} {text!r:.80}; it must be text")
        self.text = text
        self.where = where
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, name, form, conversion in string.Formatter().parse(text):
                if name is not None and (form or conversion):
                    name = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
                self._parts.append((literal, name))
        except ValueError as error:
            raise AgentError(f"{where} {text!r:.200}: {error}; a brace that is meant as one is doubled") from None
        for _, name in self._parts:
            if name is not None:
                self._steps(name)

    def _steps(self, name: str) -> tuple[str, list[str]]:
        """``task.rows[0]`` -> ``task``, ``["rows", "0"]``."""
        match = _PLACEHOLDER.match(name)
        root = match[1] if match else ""
        if match is None or root not in ROOTS:
            raise AgentError(
                f"{self.where} {self.text!r:.200} has the placeholder {{{name}}}; there are "
                f"{', '.join(ROOTS)}, and a brace that is meant as one is doubled"
            )
        steps = [key or index for key, index in _STEP.findall(match[2])]
        if root == "llm" and (len(steps) != 1 or steps[0] not in LLM_FIELDS):
            raise AgentError(
                f"{self.where} {self.text!r:.200} has the placeholder {{{name}}}; of llm there are "
                f"{', '.join(f'{{llm.{field}}}' for field in LLM_FIELDS)}"
            )
        if root not in ("llm", "task") and steps:
            raise AgentError(f"{self.where} {self.text!r:.200} has the placeholder {{{name}}}; {{{root}}} is text")
        return root, steps

    @property
    def literal(self) -> str | None:
        """The text, if there is nothing to fill in."""
        return None if any(name is not None for _, name in self._parts) else "".join(part for part, _ in self._parts)

    def fill(self, values: Mapping[str, Any], quote: bool = False) -> str:
        """The text; ``quote`` makes each value one word of a shell. Raises AgentError for what is not there."""
        quoted: Callable[[str], str] = shlex.quote if quote else str
        return "".join(
            literal + ("" if name is None else quoted(as_text(self._value(name, values))))
            for literal, name in self._parts
        )

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        root, steps = self._steps(name)
        if values.get(root) is None and root != "task":
            raise AgentError(f"{self.where} {self.text!r:.200} needs {{{name}}}, but the rollout's resources have none")
        value, path = values[root], root
        for step in steps:
            try:
                value = _step(value, step)
            except LookupError:
                raise AgentError(
                    f"{self.where} {self.text!r:.200} needs {name}, but {path} has no {step!r}: {_there(value)}"
                ) from None
            path = f"{path}.{step}"
        return value


def _step(value: Any, step: str) -> Any:
    """The value under a key, index or attribute. Raises LookupError."""
    if isinstance(value, Mapping):
        if step in value:
            return value[step]
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if step.lstrip("-").isdecimal():
            return value[int(step)]
    elif not step.startswith("_") and hasattr(value, step):
        return getattr(value, step)
    raise KeyError(step)


def _there(value: Any) -> str:
    """What a value has, in words."""
    if isinstance(value, Mapping):
        return f"it has {sorted(map(str, value))}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return f"it is a list of {len(value)}"
    if hasattr(value, "__dict__"):
        return f"it is a {type(value).__name__} with {sorted(key for key in vars(value) if key[0] != '_')}"
    return f"it is {type(value).__name__} {value!r:.80}"


def as_text(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def to_json(value: Any) -> str:
    """JSON of a task: pydantic models and dataclasses as maps, arrays as lists, anything else as its text."""
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
