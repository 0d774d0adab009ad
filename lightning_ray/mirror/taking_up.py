"""How a run takes up its folder: claimed, and if it is at a URL brought here, or what was there kept by its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lightning_ray.errors import ConfigError
from lightning_ray.mirror.claim import RECORD, WRITER, Claim, Owner
from lightning_ray.mirror.copying import LATEST
from lightning_ray.mirror.place import url_of
from lightning_ray.mirror.pull import of_checkpoint, pull
from lightning_ray.mirror.remote import RemoteFolder
from lightning_ray.run.folder import RunFolder


def take_up(folder: RunFolder, resume: bool, note: Callable[[str], None]) -> Claim:
    """Make the folder ready to be worked in, or to be gone on with; returns the claim to it.

    Raises ConfigError if somebody works on the run, or there is nothing to resume.
    """
    claim = Claim(folder.path, note)
    claim.check()
    url = url_of(folder.path)
    try:
        if url is not None:
            claim.hold()
            _bring_or_set_aside(folder.path, RemoteFolder(url), resume, claim.before, note)
        folder.create(resume)
        if url is None:
            claim.hold()
        else:
            claim.mark_place()
    except BaseException:
        claim.release()
        raise
    return claim


def _bring_or_set_aside(
    path: Path, remote: RemoteFolder, resume: bool, before: Owner | None, note: Callable[[str], None]
) -> None:
    """A place where the owner before worked is as new as the URL, or newer, and stays as it is."""
    if not resume:
        _set_aside(remote)
        return
    writer = path / WRITER
    if before is not None and writer.is_file() and writer.read_text() == before.writer:
        return
    latest = remote.read(LATEST)
    if latest is None:
        raise ConfigError(f"--resume: {remote} has no finished checkpoint; start the run without --resume")
    note(f"{remote}: {latest.decode()} is brought here, with the store")
    pull(path, of_checkpoint(latest.decode()))


def _set_aside(remote: RemoteFolder) -> None:
    """Keep what is at a URL under a name with the time."""
    names = [name for name in remote.files() if name != RECORD]
    if names:
        kept = RemoteFolder(f"{remote}-{time.strftime('%Y%m%d-%H%M%S')}")
        for name in names:
            remote.move(name, kept)
