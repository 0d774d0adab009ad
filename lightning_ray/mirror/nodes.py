"""Models and checkpoints of a run at a URL, on nodes other than the driver's: what they read is brought to them, what
they write goes to the URL.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_ray.errors import InfrastructureError
from lightning_ray.mirror.copying import files_below
from lightning_ray.mirror.place import url_of
from lightning_ray.mirror.pull import bring, everything
from lightning_ray.mirror.remote import RemoteFolder


def present(path: Path) -> Path:
    """The path, with what its URL has; of any other path just that. For folders whose files are written once.

    Raises InfrastructureError if there is nothing at the URL either.
    """
    url = url_of(path)
    if url is not None and not bring(path, RemoteFolder(url), everything) and not path.exists():
        raise InfrastructureError(f"{path} is not on this node, and there is nothing at {url}")
    return path


def hand_over(folder: Path, final: Path) -> None:
    """Send what was written into a folder here to the URL of ``final``, and remove it here."""
    url = url_of(final)
    assert url is not None
    remote = RemoteFolder(url)
    for file in files_below(folder):
        remote.put(file, file.relative_to(folder).as_posix())
    shutil.rmtree(folder)
