"""A run's folder copied to its URL: a round after the other, each sends what changed since the one before.

    figures are read  ->  store  ->  checkpoint, whole  ->  figures are sent  ->  ``latest``  ->  old checkpoints go

At whatever moment it breaks off, what is at the URL can be resumed: ``latest`` names a checkpoint that is whole, and
the store has every rollout that the checkpoint and the figures tell of. Older checkpoints come last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lightning_ray.mirror.claim import RECORD
from lightning_ray.mirror.place import url_of
from lightning_ray.mirror.remote import RemoteFolder
from lightning_ray.mirror.sent import Content, Sent
from lightning_ray.mirror.stores import copy_store, sealed_by, store_folders
from lightning_ray.run.folder import RunFolder, step_of
from lightning_ray.store.manifest import manifest_path

LATEST = "checkpoints/latest"
NOT_FIGURES = ("store", "checkpoints", "model", "models")
LARGE = 2**25
"""Bytes of a file that is not held in memory over a round."""


class RunCopy:
    """The copy of one run, made by one thread."""

    def __init__(self, path: Path) -> None:
        url = url_of(path)
        assert url is not None
        self.remote = RemoteFolder(url)
        self._folder = RunFolder(path)
        self._sent = Sent(path, self.remote)
        self._known = False

    def round(self) -> None:
        """Send what changed. Raises whatever the storage raises; the next round goes on where this one stopped."""
        if not self._known:
            self._recognise()
        folder, sent = self._folder, self._sent
        pointer = folder.checkpoints / "latest"
        latest = sent.changed(pointer) if pointer.is_file() else None
        held, large = self._changed_figures()
        for file in self._models():
            sent.put(file)
        if folder.store.is_dir():
            copy_store(folder.store, sent)
        if latest is not None:
            for file in files_below(folder.checkpoints / latest.data.decode()):
                sent.put(file)
        for content in held:
            sent.write(content)
        for file in large:
            sent.put(file)
        if latest is not None:
            sent.write(latest)
            self._drop_old_checkpoints()
        self._older_checkpoints()

    @property
    def last_sent(self) -> float:
        """When a file was sent last, by ``time.monotonic``."""
        return self._sent.last

    def missing(self) -> list[str]:
        """The files whose present content is not there."""
        files = [*self._figures(), *self._models()]
        if self._folder.checkpoints.is_dir():
            files += [file for file in files_below(self._folder.checkpoints) if ".writing" not in str(file)]
        if self._folder.store.is_dir():
            files += [file for file in files_below(self._folder.store) if file.name != "lock"]
        return [file.relative_to(self._folder.path).as_posix() for file in files if not self._sent.has(file)]

    def _recognise(self) -> None:
        """What is there of a run that is resumed, and never changes."""
        found = self.remote.files()
        files = list(self._models())
        for folder in store_folders(self._folder.store):
            name = manifest_path(folder).relative_to(self._folder.path).as_posix()
            if name in found and (manifest := self.remote.read(name)) is not None:
                files += sealed_by(folder, manifest)
        latest = (self.remote.read(LATEST) or b"").decode()
        for checkpoint in self._folder.checkpoints.glob("step-*"):
            if checkpoint.name <= latest:  # of a later one, an older content may have been sent in part
                files += files_below(checkpoint)
        self._sent.recognise(found, files)
        self._known = True

    def _changed_figures(self) -> tuple[list[Content], list[Path]]:
        """What small ones hold now, and which are large."""
        held, large = list[Content](), list[Path]()
        for file in self._figures():
            with suppress(FileNotFoundError):  # a tracker's own, and gone
                if file.stat().st_size > LARGE:
                    large.append(file)
                elif (content := self._sent.changed(file)) is not None:
                    held.append(content)
        return held, large

    def _figures(self) -> Iterator[Path]:
        """All files but those of the store, checkpoints and models, and drafts."""
        for file in files_below(self._folder.path):
            own = file.relative_to(self._folder.path)
            hidden = own.name.startswith(".") and not own.name.endswith("-id")
            if own.parts[0] not in NOT_FIGURES and not hidden and own.name != RECORD:
                yield file

    def _models(self) -> Iterator[Path]:
        for name in ("model", "models"):
            yield from files_below(self._folder.path / name)

    def _older_checkpoints(self) -> None:
        """Those that are kept, and were not sent while they were the latest."""
        for checkpoint in sorted(self._folder.checkpoints.glob("step-*"))[:-1]:
            with suppress(FileNotFoundError):  # it is kept no more
                for file in files_below(checkpoint):
                    self._sent.put(file)

    def _drop_old_checkpoints(self) -> None:
        there = self.remote.files("checkpoints")
        steps = {name: step_of(name.split("/")[1]) for name in there if name.startswith("checkpoints/step-")}
        old = self._folder.superseded({step for step in steps.values() if step is not None})
        self.remote.remove([name for name, step in steps.items() if step in old])


def send_evaluation(path: Path) -> None:
    """Send an evaluation's folder to its URL, if it is the place of one; what was there is replaced."""
    if (url := url_of(path)) is not None:
        remote = RemoteFolder(url)
        remote.remove(list(remote.files()))
        RunCopy(path).round()


def files_below(folder: Path) -> list[Path]:
    """All files of a folder, behind links too."""
    return sorted(Path(at) / name for at, _, names in os.walk(folder, followlinks=True) for name in names)
