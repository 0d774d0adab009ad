"""Fixtures that several files use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tests", deadline=None)  # a busy machine is no defect
settings.load_profile("tests")
_verdict = pytest.StashKey[int]()


def pytest_configure() -> None:
    """Tests send Ctrl-C, which a shell has ignored by what it puts into the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_verdict] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The tests' verdict is the exit code: a native thread of a library that outlives the interpreter may crash it."""
    if _verdict in config.stash:
        for child in multiprocessing.active_children():  # an orderly end would wait for them
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_verdict])


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """Another environment, without any package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True, timeout=60)
    return str(tmp_path / "env/bin/python")


@pytest.fixture
def other_python(bare_python: str) -> str:
    """Another environment, with the base dependencies: links to this one's packages, without the heavy ones."""
    [packages] = Path(bare_python).parent.parent.glob("lib/python*/site-packages")
    here = Path(pytest.__file__).parent.parent
    for each in here.iterdir():
        if not each.name.startswith(("torch", "vllm", "verl", "ray", "transformers", "__editable__", "distutils")):
            (packages / each.name).symlink_to(each)
    return bare_python
