"""A replica's temporary files lie in the session folder of its Ray, with those of Ray itself.

A replica is killed more often than it ends, and the engine then leaves sockets and files of its processes behind.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import ray

SOCKET_BYTES = 107
"""What the path of a socket may have."""
NAME_BYTES = 37
"""What the engine adds to the folder for a socket's path."""


def keep_with_ray() -> None:
    """Make the session folder of this process's Ray its temporary folder, and that of processes it starts."""
    if not ray.is_initialized():  # a replica by itself
        return
    context = ray.get_runtime_context()
    os.environ.setdefault("RAY_ADDRESS", context.gcs_address)  # which Ray looks for below the temporary folder
    keep_in(Path(context.get_temp_dir(), context.get_session_name()))


def keep_in(session: Path) -> None:
    """Make a folder of ``session`` the temporary one, unless one was chosen, or nothing can be written there, or
    sockets would have no room.
    """
    folder, chosen = str(session / "tmp"), os.environ.get("TMPDIR")
    if not has_room(folder) or (chosen and has_room(chosen)):
        return
    try:
        Path(folder).mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            os.environ["TMPDIR"] = tempfile.tempdir = folder
    except OSError:
        return


def has_room(folder: str) -> bool:
    """Whether the engine's sockets may have their paths there."""
    return len(os.fsencode(folder)) + NAME_BYTES <= SOCKET_BYTES
