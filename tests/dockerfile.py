"""A Dockerfile's instructions, and what .dockerignore leaves of a build's context."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

KNOWN = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "LABEL",
    "RUN",
    "SHELL",
    "USER",
    "VOLUME",
    "WORKDIR",
}


@dataclass
class Stage:
    """What is built between two FROMs."""

    base: str
    name: str = ""
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and arguments."""

    def of(self, instruction: str) -> list[str]:
        """The arguments of every such instruction."""
        return [arguments for name, arguments in self.steps if name == instruction]


def stages_of(text: str) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError for an instruction that there is not."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = [Stage("")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction not in KNOWN:
            raise ValueError(f"{instruction}: there is no such instruction")
        if instruction == "FROM":
            base, *name = arguments.split(" AS ")
            found.append(Stage(base.strip(), *(each.strip() for each in name)))
        else:
            found[-1].steps.append((instruction, " ".join(arguments.split())))
    return found


def in_context(path: str, ignore: str) -> bool:
    """Whether a path of the repository reaches the build: the last pattern that matches it or its folder says."""
    parts = Path(path).parts
    reaches = True
    for line in ignore.splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        deep = pattern.startswith("**/")
        wanted = pattern.removeprefix("**/")
        places = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if any(fnmatch(place, wanted) or (deep and fnmatch(place.rpartition("/")[2], wanted)) for place in places):
            reaches = line.strip().startswith("!")
    return reaches
