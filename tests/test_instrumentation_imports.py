"""Clients are traced from when they are imported, whoever imports them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lightning_ray.instrumentation.imports import when_imported


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that nobody has imported."""
    (tmp_path / "late_client.py").write_text("made = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "late_client", raising=False)
    return "late_client"


def test_it_is_done_once_and_when_the_module_is_whole(late: str) -> None:
    seen: list[int] = []
    when_imported(late, lambda module: seen.append(module.made))
    assert seen == []
    importlib.import_module(late)
    assert seen == [1]
    when_imported(late, lambda module: seen.append(module.made + 1))
    assert seen == [1, 2]


def test_it_can_be_called_off(late: str) -> None:
    seen: list[ModuleType] = []
    when_imported(late, seen.append)()
    importlib.import_module(late)
    assert seen == []


def test_a_module_that_fails_is_done_when_it_is_imported_well(late: str, tmp_path: Path) -> None:
    seen: list[ModuleType] = []
    when_imported(late, seen.append)
    path = tmp_path / "late_client.py"
    path.write_text("raise RuntimeError('not yet')\n")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(late)
    path.write_text("made = 'well, and of another length'\n")
    importlib.invalidate_caches()
    assert importlib.import_module(late) in seen


def test_clients_are_not_imported_to_be_traced_and_are_traced_all_the_same() -> None:
    script = """
import sys
from lightning_ray.instrumentation import instrument_clients
instrument_clients()
assert not {"openai", "anthropic"} & set(sys.modules)
import openai, anthropic
for package in (openai, anthropic):
    assert hasattr(package._base_client.AsyncAPIClient.request, "__wrapped__"), package
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
