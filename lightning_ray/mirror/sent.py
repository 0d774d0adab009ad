"""What of a local folder is at its URL already, by size and time of each file, so that only what changed is sent."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_ray.mirror.remote import File, RemoteFolder

Signature = tuple[int, int]
"""Bytes, and the time of the last change in ns."""


@dataclass(frozen=True)
class Content:
    """What a file held at a moment."""

    file: Path
    signature: Signature
    data: bytes


class Sent:
    """Sends files of a folder, under the names that they have in it."""

    def __init__(self, root: Path, remote: RemoteFolder) -> None:
        self.root = root
        self.remote = remote
        self.last = time.monotonic()
        """When something was sent."""
        self._known: dict[str, Signature] = {}
        self._found: set[str] = set()
        """What was there before anything was sent."""

    def recognise(self, found: Mapping[str, File], files: Iterable[Path]) -> None:
        """Take those of the files for sent that never change, and have the size there that they have here."""
        self._found = set(found)
        for file in files:
            there = found.get(self._name(file))
            if there is not None and file.is_file() and file.stat().st_size == there.size:
                self._known[self._name(file)] = signature(file)

    def has(self, file: Path) -> bool:
        """Whether the file as it is now was sent."""
        return self._known.get(self._name(file)) == signature(file)

    def put(self, file: Path) -> None:
        """Send a file that does not change meanwhile, unless it was. Raises FileNotFoundError if it is gone."""
        now = signature(file)
        if self._known.get(self._name(file)) != now:
            self.remote.put(file, self._name(file))
            self._note(self._name(file), now)

    def write(self, content: Content) -> None:
        """Send what a file held, unless it was."""
        name = self._name(content.file)
        if self._known.get(name) != content.signature:
            self.remote.write(name, content.data)
            self._note(name, content.signature)

    def changed(self, file: Path) -> Content | None:
        """What a file holds that may change at any time, as long as it is now; None if that was sent."""
        now = signature(file)
        if self._known.get(self._name(file)) == now:
            return None
        with file.open("rb") as opened:
            return Content(file, now, opened.read(now[0]))

    def keep(self, folder: Path, files: Collection[Path]) -> None:
        """Remove what was sent of a folder, or was there before, and is none of these files."""
        prefix, wanted = f"{self._name(folder)}/", {self._name(file) for file in files}
        there = [name for name in {*self._known, *self._found} if name.startswith(prefix) and name not in wanted]
        self.remote.remove(there)
        self._found.difference_update(there)
        for name in there:
            self._known.pop(name, None)

    def _note(self, name: str, sent: Signature) -> None:
        self._known[name] = sent
        self.last = time.monotonic()

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def signature(file: Path) -> Signature:
    """Of a file as it is now. Raises FileNotFoundError."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
