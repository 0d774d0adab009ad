"""What the optimising model is asked, as text files in Jinja: ours, in ``prompts/``, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError
from lightning_ray.templates import TemplateError, holes, render

_OURS = Path(__file__).parent / "prompts"
CRITIQUE = (_OURS / "critique_causes.txt", _OURS / "critique_rules.txt")
EDIT = (_OURS / "edit_rewrite.txt", _OURS / "edit_smallest.txt")
MERGE = (_OURS / "merge.txt",)

COMMON = frozenset({"name", "several", "template", "engine", "placeholders", "others"})
FIELDS = {
    "gradient_prompt_files": COMMON | {"runs"},
    "apply_edit_prompt_files": COMMON | {"critique"},
    "merge_prompt_files": COMMON | {"first", "second", "ancestor"},
}
"""Setting -> what its files may use."""


class PromptFile:
    """One file, read once."""

    def __init__(self, path: Path, fields: frozenset[str]):
        self.path = path
        self._fields = fields
        try:
            self._text = path.expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read: {error}") from None

    def check(self, setting: str) -> None:
        """Raises ConfigError for a file that is no Jinja, or asks for what there is not."""
        try:
            unknown = holes("jinja", self._text) - self._fields
        except TemplateError as error:
            raise ConfigError(f"{setting}: {str(self.path)!r}: {error}") from None
        if unknown:
            raise ConfigError(
                f"{setting}: {str(self.path)!r} uses {', '.join(sorted(unknown))}, which there is not; there are "
                f"{', '.join(sorted(self._fields))}"
            )

    def render(self, **values: Any) -> str:
        """The file with its fields filled. Raises ConfigError if it cannot be."""
        try:
            return render("jinja", self._text, values)
        except TemplateError as error:
            raise ConfigError(f"{str(self.path)!r}: {error}") from None


def read_prompts(setting: str, given: Sequence[Path], ours: Sequence[Path]) -> list[PromptFile]:
    """The files of a setting, or ours if it names none. Raises ConfigError."""
    files = [PromptFile(path, FIELDS[setting]) for path in given or ours]
    for file in files:
        file.check(setting)
    return files
