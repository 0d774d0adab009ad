"""What is at a URL, brought to its local place on this node: a run to be resumed or read, a model, a checkpoint.

A file is fetched unless the very content that the listing tells of was fetched before, or the file was written here.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.mirror.claim import RECORD, WRITER, written_here
from lightning_ray.mirror.place import url_of
from lightning_ray.mirror.remote import File, RemoteFolder
from lightning_ray.run.folder import RunFolder

Wanted = Callable[[str], bool]
TRIES = 10
"""Times to look again, as the run went on meanwhile."""


def pull(path: Path, wanted: Wanted) -> None:
    """Make a run's place like what of its URL is wanted; all else goes.

    Raises ConfigError if there is nothing at the URL, InfrastructureError if it changes all the time.
    """
    url = url_of(path)
    assert url is not None
    remote = RemoteFolder(url)
    listed = remote.files()
    if not listed:
        raise ConfigError(f"{url}: there is nothing")
    if (path / WRITER).is_file():  # of an owner before the last, the end of whose work may never have been sent
        RunFolder(path).set_aside()
    for _ in range(TRIES):
        try:
            bring(path, remote, wanted)
        except FileNotFoundError:  # a store's files are replaced by others
            listed = remote.files()
            continue
        before, listed = listed, remote.files()
        if _in_folders(listed) == _in_folders(before):
            _remove_others(path, listed, wanted)
            return
    raise InfrastructureError(f"{url} changed each of {TRIES} times that it was read; try again, or copy it by hand")


def everything(name: str) -> bool:
    """All files."""
    return True


def but_weights(name: str) -> bool:
    """What tells of a run, without what only training and serving need."""
    return "/trainer_state/" not in name and not name.endswith((".safetensors", ".bin"))


def of_checkpoint(latest: str) -> Wanted:
    """All files, but of the checkpoints this one alone."""
    return lambda name: not name.startswith("checkpoints/step-") or name.startswith(f"checkpoints/{latest}/")


def fetched(path: Path, wanted: Wanted, needed: bool = True) -> Path:
    """The place of a run at a URL, to be read: as it is where the run is, or was, worked on; elsewhere pulled. Any
    other path as it is. Raises ConfigError if there is nothing at the URL, and it is needed.
    """
    url = url_of(path)
    if url is not None and not written_here(path) and (needed or RemoteFolder(url).files()):
        pull(path, wanted)
    return path


def bring(path: Path, remote: RemoteFolder, wanted: Wanted) -> bool:
    """Fetch what is not here; whether there is anything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        listed = {name: file for name, file in remote.files().items() if wanted(name) and name != RECORD}
        record = path.with_name(f".{path.name}.pulled")
        known: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
        lacking = [name for name, file in listed.items() if not _is_here(path / name, file, known.get(name))]
        for name in lacking:
            (path / name).unlink(missing_ok=True)
        # Noted before they are fetched: what breaks off leaves files that are missing, and none of an unknown content.
        record.write_text(json.dumps(known | {name: listed[name].token for name in lacking}))
        for name in lacking:
            remote.get(name, path / name)
    return bool(listed)


def _is_here(file: Path, told: File, known: str | None) -> bool:
    if not file.is_file() or file.stat().st_size != told.size:
        return False
    return known in (None, told.token)


def _remove_others(path: Path, listed: dict[str, File], wanted: Wanted) -> None:
    for file in [file for file in path.rglob("*") if file.is_file()]:
        name = file.relative_to(path).as_posix()
        if name not in listed or not wanted(name):
            file.unlink()


def _in_folders(listed: dict[str, File]) -> dict[str, File]:
    """What belongs together: of the figures at the root each is for itself."""
    return {name: file for name, file in listed.items() if "/" in name}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this node at a time."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
