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
    monkeypatch.setenv("TMPDIR", "/usual")
    return "/usual"


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_they_lie_in_rays_session_folder(short_path: Path, usual: str) -> None:
    for _ in range(2):
        keep_in(short_path)
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(short_path / "tmp")
    assert (short_path / "tmp").is_dir()


@pytest.mark.parametrize("session", ["gone", "x" * 80])
def test_they_stay_where_there_is_no_room_for_them(short_path: Path, usual: str, session: str) -> None:
    if session != "gone":
        (short_path / session).mkdir()
    keep_in(short_path / session)
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == usual
    assert not (short_path / session / "tmp").exists()
