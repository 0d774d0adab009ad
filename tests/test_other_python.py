"""Agents played by another environment's interpreter: what it finds there, and what is said if it cannot."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.config import RunnerSettings
from lightning_ray.isolation import interpreter
from lightning_ray.isolation.calls import CallsInProcesses
from lightning_ray.isolation.interpreter import check, own_folders
from lightning_ray.running.travel import pickled
from lightning_ray.tracing import AttemptTrace
from lightning_ray.types import Attempt, AttemptedRollout

ROOT = Path(__file__).resolve().parent.parent
ROLLOUT = AttemptedRollout(
    rollout_id="r",
    input={},
    start_time=0.0,
    attempt=Attempt(rollout_id="r", attempt_id="a", sequence_id=1, start_time=0.0),
)


@lr.rollout
def looks_around(task: dict[str, Any], llm: lr.LLM) -> None:
    """Says which Python it is, what it was given to import from, and whether it sees this environment's packages."""
    import importlib.util
    import sys

    found = {name: importlib.util.find_spec(name) is not None for name in ("vllm", "own_module")}
    lr.emit_object({"prefix": sys.prefix, "path": os.environ["PYTHONPATH"], **found})


def program(file: Path, text: str) -> str:
    """An executable file."""
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def fake(folder: Path, version: str, lacks: str = "null") -> str:
    """What answers as an interpreter of that version does."""
    return program(folder / "python", f'#!/bin/sh\necho \'noise\n{{"version": [{version}], "lacks": {lacks}}}\'\n')


async def played(agent: Any, python: str) -> AttemptTrace:
    """The trace of one attempt."""
    calls = CallsInProcesses(agent, python)
    trace = AttemptTrace("r", "a")
    try:
        await calls.call(ROLLOUT, {"main_llm": lr.LLM(endpoint="http://host:1/v1", model="m")}, trace)
    finally:
        await calls.close()
    return trace


async def test_it_finds_ours_and_its_own_and_not_our_packages(
    other_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user/own_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "user")
    [span] = (await played(looks_around, other_python)).as_spans()
    seen = lr.get_object_value(span)
    assert seen["prefix"] == str(tmp_path / "env") and seen["own_module"] and not seen["vllm"]
    assert {str(ROOT), str(tmp_path / "user")} <= set(seen["path"].split(os.pathsep))
    assert not any("site-packages" in folder for folder in seen["path"].split(os.pathsep))


def test_our_folders_are_those_outside_of_the_environment() -> None:
    folders = own_folders()
    assert str(ROOT) in folders
    assert not any(folder.startswith(sys.base_prefix) or "site-packages" in folder for folder in folders)


async def test_what_cannot_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(lr.AgentError, match=r"no/such/python' cannot be started: .*No such file.* such as env/"):
        await played(looks_around, str(tmp_path / "no/such/python"))


@pytest.mark.parametrize(
    ("version", "lacks", "expected"),
    [
        ("3, 9", "null", "is Python 3.9; lightning-ray needs 3.11"),
        ("3, 99", "null", r"is Python 3.99, which cannot load an agent .* make that environment with Python 3\.\d+"),
        (f"3, {sys.version_info.minor}", '"msgpack"', "lacks 'msgpack'.*run: .*python -m pip install lightning-ray"),
    ],
)
async def test_an_environment_that_does_not_fit_says_why(
    tmp_path: Path, version: str, lacks: str, expected: str
) -> None:
    with pytest.raises(lr.AgentError, match=expected):
        await played(looks_around, fake(tmp_path, version, lacks))


async def test_an_agent_that_a_module_has_may_go_to_another_version(tmp_path: Path) -> None:
    await check(fake(tmp_path, "3, 99"), pickled(lr.LitAgent()))


async def test_what_is_no_python_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(lr.AgentError, match=r"is no Python that works.*: I am a shell"):
        await played(looks_around, program(tmp_path / "python", "#!/bin/sh\necho I am a shell\n"))


async def test_the_probe_of_a_bare_environment_names_what_it_lacks(bare_python: str) -> None:
    with pytest.raises(lr.AgentError, match=r"lacks '[a-z_]+', which lightning-ray needs"):
        await played(looks_around, bare_python)


async def test_it_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    async def counted(python: str, agent: bytes) -> None:
        asked.append(python)

    monkeypatch.setattr("lightning_ray.isolation.calls.check", counted)
    calls = CallsInProcesses(looks_around, sys.executable)
    await calls.open(2)
    await calls.close()
    assert asked == [sys.executable]


def test_it_implies_processes_and_an_absolute_path() -> None:
    settings = RunnerSettings(python="env/bin/python")
    assert settings.isolation == "process" and settings.python == str(Path.cwd() / "env/bin/python")
    assert RunnerSettings(python="python3.13").python == "python3.13"
    assert RunnerSettings().isolation is None
    assert interpreter.OLDEST == (3, 11)
