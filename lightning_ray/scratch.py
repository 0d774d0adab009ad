"""Folders for what a process needs while it lives; those of processes that were killed are removed by the next.

A folder is locked for as long as its owner lives, so that it cannot be taken for one that was left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from lightning_ray.machine import short_temp

PREFIX = "lrr-"
"""Short: HAProxy's sockets lie below, behind a node's id of 56 digits, and a socket's path may have 97 characters."""
FRESH_SECONDS = 60.0
"""A folder that was changed since then may be one whose owner is about to lock it."""


class Scratch:
    """A new folder of this process, gone with ``remove``."""

    def __init__(self, root: Path | None = None):
        root = Path(short_temp()) if root is None else root
        remove_left_behind(root)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_left_behind(root: Path) -> None:
    """Remove the folders in ``root`` whose owners have ended without doing so."""
    for folder in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            if time.time() - folder.stat().st_mtime > FRESH_SECONDS:
                _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
