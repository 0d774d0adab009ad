"""The images' Dockerfile: known instructions, pinned environments, what it copies is there, and nobody is root."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster_file import ROOT
from tests.dockerfile import Stage, in_context, stages_of

TEXT = (ROOT / "Dockerfile").read_text()
IGNORE = (ROOT / ".dockerignore").read_text()
KINDS = ("runner", "gpu", "cpu")


def complaints(text: str) -> list[str]:
    """What would build, but not what is wanted."""
    [head, *stages] = stages_of(text)
    named = {stage.name: stage for stage in stages if stage.name}
    found = [] if head.of("ARG") == ["KIND=cpu"] else ["ARG KIND"]
    for stage in stages:
        if stage.base not in (*named, "${KIND}") and (":" not in stage.base or stage.base.endswith(":latest")):
            found.append(f"FROM {stage.base}")
        for copied in stage.of("COPY"):
            found += [f"COPY {path}" for path in copied.split()[:-1] if not there(path)]
        found += [f"RUN {run}" for run in stage.of("RUN") if "pip install" in run and "--no-deps" not in run]
    last = stages[-1]
    if not last.of("USER") or last.of("USER")[-1].split(":")[0] in ("0", "root") or last.steps[-1][0] != "USER":
        found.append("USER")
    found += [f"KIND={kind}" for kind in KINDS if not pinned(named.get(kind), kind)]
    return found


def there(path: str) -> bool:
    return (ROOT / path).exists() and in_context(path, IGNORE)


def pinned(stage: Stage | None, kind: str) -> bool:
    file = f"requirements/{kind}.txt"
    return stage is not None and any(f"--no-deps -r {file}" in run for run in stage.of("RUN")) and there(file)


def test_the_images_are_pinned_whole_and_nobody_s_root() -> None:
    assert complaints(TEXT) == []


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("USER 1000:1000", "USER root", "USER"),
        ("USER 1000:1000\n", "", "USER"),
        ("COPY actors actors", "COPY actor actor", "COPY actor"),
        ("COPY examples examples", "COPY tests tests", "COPY tests"),
        ("python:3.11-slim-bookworm", "python:latest", "FROM python:latest"),
        ("FROM system AS gpu", "FROM system AS cuda", "KIND=gpu"),
        ("--no-deps -r requirements/runner.txt", "-r requirements/runner.txt", "KIND=runner"),
    ],
)
def test_what_is_wrong_is_told(old: str, new: str, told: str) -> None:
    assert old in TEXT
    assert told in complaints(TEXT.replace(old, new))


def test_an_unknown_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="COPPY"):
        stages_of(TEXT.replace("COPY actors", "COPPY actors"))


@pytest.mark.parametrize(
    "path, reaches",
    [
        ("lightning_ray/cli.py", True),
        ("requirements/gpu.txt", True),
        ("lightning_ray/__pycache__/cli.pyc", False),
        ("examples/frameworks/node/node_modules/x.js", False),
        (".git/config", False),
        (".venv/bin/python", False),
        ("runs/sql/summary.json", False),
        ("deployments/kuberay/base/redis.yaml", False),
        ("deployments/serving.py", True),
    ],
)
def test_the_build_s_context_is_what_is_copied(path: str, reaches: bool) -> None:
    assert in_context(path, IGNORE) is reaches


def test_the_python_is_that_of_the_pins() -> None:
    [system] = [stage for stage in stages_of(TEXT) if stage.name == "system"]
    assert system.base.startswith("python:3.11-") and "Python 3.11" in (ROOT / "requirements/gpu.txt").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_has_what_the_package_asks_for(kind: str) -> None:
    lines = (line.split("==") for line in (ROOT / f"requirements/{kind}.txt").read_text().split() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in lines}
    missing = [
        str(wanted)
        for wanted in wanted_by(kind)
        if not wanted.specifier.contains(pins.get(canonicalize_name(wanted.name), "0"), prereleases=True)
    ]
    assert missing == []


def wanted_by(kind: str) -> Iterator[Requirement]:
    """The package's requirements with the extra of that name, those of extras within included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    left = [*project["dependencies"], f"lightning-ray[{kind}]"]
    while left:
        requirement = Requirement(left.pop())
        if requirement.name == project["name"]:
            left += [each for extra in requirement.extras for each in project["optional-dependencies"][extra]]
        else:
            yield requirement
