"""Where a replica's temporary files lie."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.temporary import keep_in


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tempfile, "tempdir", "/usual")
    monkeypatch.delenv("TMPDIR", raising=False)
    return "/usual"


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_they_lie_in_rays_session_folder(short_path: Path, usual: str) -> None:
    keep_in(short_path)
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(short_path / "tmp")
    tempfile.NamedTemporaryFile().close()


@pytest.mark.parametrize("session", ["gone", "x" * 80, "a file"])
def test_they_stay_where_there_is_no_room_for_them(short_path: Path, usual: str, session: str) -> None:
    (short_path / "a file").touch()
    (short_path / ("x" * 80)).mkdir()
    keep_in(short_path / session)
    assert tempfile.gettempdir() == usual and "TMPDIR" not in os.environ


def test_a_folder_that_was_chosen_is_used(short_path: Path, usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", usual)
    keep_in(short_path)
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == usual
    monkeypatch.setenv("TMPDIR", "/" + "x" * 80)
    keep_in(short_path)
    assert os.environ["TMPDIR"] == str(short_path / "tmp"), "sockets had no room there"
