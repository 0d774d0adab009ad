"""The folder of one attempt: where its program works, its task, its reward, and its temporary files.

    task.json   the task                                   LIGHTNING_TASK_FILE
    reward      written by the program, if it likes        LIGHTNING_REWARD_FILE
    work/       where it runs: empty, or a copy of ``cwd``
    tmp/        its TMPDIR

Removed with the attempt unless it is to be kept.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lightning_ray.errors import AgentError


@dataclass(frozen=True)
class AttemptFolder:
    """The folder and where in it things are."""

    root: Path
    work: Path
    """``root/work``, or ``cwd`` itself if the program runs in place."""

    @property
    def task_file(self) -> Path:
        """The task as JSON, or as it is if it is text."""
        return self.root / "task.json"

    @property
    def reward_file(self) -> Path:
        """Does not exist until the program writes it."""
        return self.root / "reward"

    @property
    def temporary(self) -> Path:
        """For the program's temporary files."""
        return self.root / "tmp"

    def remove(self) -> None:
        """Remove it, however the program left it."""
        shutil.rmtree(self.root, onerror=_opened_up)


def _opened_up(function: object, path: str, error: object) -> None:
    """A folder without permissions is given them, once; what still cannot be removed stays."""
    parent = Path(path).parent
    try:
        parent.chmod(0o700)
        if Path(path).is_dir() and not Path(path).is_symlink():
            Path(path).chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink(missing_ok=True)
    except OSError:
        pass


def make_folder(task: str, cwd: Path | None, in_place: bool, keep_in: Path | None, name: str) -> AttemptFolder:
    """The folder with its task. Raises AgentError if ``cwd`` is not on this machine."""
    if cwd is not None and not cwd.is_dir():
        raise AgentError(f"cwd={str(cwd)!r} is no folder on this machine")
    if keep_in is not None:
        keep_in.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=f"{name}-" if keep_in else "lightning-", dir=keep_in)).resolve()
    folder = AttemptFolder(root, cwd if cwd is not None and in_place else root / "work")
    folder.temporary.mkdir()
    folder.task_file.write_text(task, encoding="utf-8")
    if cwd is None:
        folder.work.mkdir()
    elif not in_place:
        shutil.copytree(cwd, folder.work, symlinks=True)
    return folder
