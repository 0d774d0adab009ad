"""Scratch folders: kept while their process lives, whatever others do; removed by the next one when it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from lightning_ray.scratch import FRESH_SECONDS, Scratch, remove_left_behind

OWNER = """
import sys, time
from pathlib import Path
from lightning_ray.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "log").write_text("something")
print(scratch.path, flush=True)
time.sleep(60)
"""


def age(folder: Path) -> None:
    """Make it look old."""
    then = folder.stat().st_mtime - 2 * FRESH_SECONDS
    os.utime(folder, (then, then))


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        age(theirs)
        ours = Scratch(tmp_path)
        assert (theirs / "log").exists(), "its owner lives"
        os.kill(owner.pid, signal.SIGKILL)
    remove_left_behind(tmp_path)
    assert not theirs.exists() and ours.path.exists()


def test_a_fresh_folder_is_not_removed_before_it_is_locked(tmp_path: Path) -> None:
    ours = Scratch(tmp_path)
    os.close(ours._lock)
    remove_left_behind(tmp_path)
    assert ours.path.exists()
    age(ours.path)
    remove_left_behind(tmp_path)
    assert not ours.path.exists()


def test_a_folder_is_gone_with_its_end_and_others_stay(tmp_path: Path) -> None:
    other = tmp_path / "lr-something"
    other.mkdir()
    age(other)
    ours = Scratch(tmp_path)
    ours.remove()
    assert list(tmp_path.iterdir()) == [other]
