"""The interpreter of a child: this one with what can be imported here, or another environment's with its own packages.

Another environment has lightning-ray's base dependencies and what the agent imports; from here it gets the folders of
lightning-ray and of the user's own modules, and none of this environment's packages.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

import lightning_ray
from lightning_ray.deaths.last_words import last_words
from lightning_ray.errors import AgentError
from lightning_ray.programs.process import NotStartedError, Program, Specification

MARK = "LIGHTNING_RAY_CHILD"
HIDDEN = ("RAY_",)
"""Beginnings of variables that a child does not get: it is none of Ray's."""
OURS = ("PYTHONHOME", "VIRTUAL_ENV")
"""Variables that say where this environment is."""
OLDEST = (3, 11)
"""Python that lightning-ray needs."""
PROBE_SECONDS = 120.0
PROBE = """
import json, sys
lacks = None
try:
    if sys.version_info >= (3, 11):
        import cloudpickle, lightning_ray.isolation.child, openai, opentelemetry.sdk.trace
except ImportError as error:
    lacks = error.name if isinstance(error, ModuleNotFoundError) else str(error)
print()
print(json.dumps({"version": sys.version_info[:2], "lacks": lacks}))
"""
"""Says which Python it is, and what lightning-ray misses there."""
CODE = b"CodeType"
"""In pickles of functions by value: bytecode, which is one minor version's."""


def specification(arguments: list[str], python: str | None = None) -> Specification:
    """How this interpreter, or ``python``, is started with these arguments."""
    executable = sys.executable if python is None else shutil.which(python) or python
    hidden = HIDDEN if python is None else HIDDEN + OURS
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    mark = secrets.token_hex(8)
    folders = [entry or os.getcwd() for entry in sys.path] if python is None else own_folders()
    return Specification(
        argv=[executable, *arguments],
        executable=executable,
        env={**inherited, "PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1", MARK: mark},
        cwd=os.getcwd(),
        mark=f"{MARK}={mark}",
        grace_seconds=0.0,
    )


def own_folders() -> list[str]:
    """Where lightning-ray and the user's modules are imported from, without the standard library and site-packages."""
    home = str(Path(lightning_ray.__file__).resolve().parent.parent)
    known = sysconfig.get_paths()
    packages = [known[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    packages += [*site.getsitepackages(), site.getusersitepackages()]
    real = [os.path.realpath(folder) for folder in packages]
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    folders = [os.path.abspath(entry or os.getcwd()) for entry in (*sys.path, home)]
    return [
        folder
        for folder in dict.fromkeys(folders)
        if os.path.basename(folder) != archive and not any(_is_within(folder, each) for each in real)
    ]


def _is_within(folder: str, other: str) -> bool:
    return Path(os.path.realpath(folder)).is_relative_to(other)


async def check(python: str, agent: bytes) -> None:
    """Raises AgentError, with the fix, if that interpreter cannot play the (pickled) agent."""
    program = Program(specification(["-c", PROBE], python))
    try:
        await program.run(PROBE_SECONDS)
    except NotStartedError as error:
        raise AgentError(
            f"python={python!r} cannot be started: {error}; give the path of an environment's interpreter, such as "
            "env/bin/python, that is there on every node"
        ) from None
    found = _found(program.stdout)
    if found is None:
        said = last_words(program.stderr) or last_words(program.stdout) or "nothing"
        raise AgentError(f"python={python!r} is no Python that works; asked for its version it said: {said}")
    version, lacks = tuple(found["version"]), found["lacks"]
    if version < OLDEST:
        raise AgentError(f"python={python!r} is Python {_dotted(version)}; lightning-ray needs {_dotted(OLDEST)}")
    here = sys.version_info[:2]
    if version != here and CODE in agent:
        raise AgentError(
            f"python={python!r} is Python {_dotted(version)}, which cannot load an agent that was sent, as a function, "
            f"by Python {_dotted(here)}: make that environment with Python {_dotted(here)}, or make the agent a class "
            "in a module"
        )
    if lacks is not None:
        raise AgentError(
            f"the environment of python={python!r} lacks {lacks!r}, which lightning-ray needs to play an agent; "
            f"run: {python} -m pip install lightning-ray"
        )


def _found(said: str) -> dict[str, Any] | None:
    try:
        found = json.loads(said.strip().splitlines()[-1])
        return found if {"version", "lacks"} <= set(found) else None
    except (IndexError, TypeError, ValueError):
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
