"""Who works on a run: one process at a time, told by ``owner.json`` in the run's folder, or at its URL.

The owner renews the record, and marks it when it ends. One that died on this machine is known by its process; of one on
another it is watched whether the record is renewed, whatever the clocks say.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.job_id import this_job
from lightning_ray.mirror.place import url_of
from lightning_ray.mirror.remote import RemoteFolder

RECORD = "owner.json"
WRITER = ".writer"
"""In a URL's local place: who wrote what is here."""
RENEW_SECONDS = 10.0
SILENT_SECONDS = 45.0
"""How long an owner on another machine must not have renewed its record to count as dead."""


@dataclass(frozen=True)
class Owner:
    """The record. ``job`` is Ray's submission id, ``process_began`` a time of the owner's machine, ``beat`` counts
    renewals.
    """

    writer: str
    host: str
    pid: int
    process_began: float
    job: str | None = None
    beat: int = 0
    ended: bool = False

    @classmethod
    def of_this_process(cls) -> Owner:
        """A new one."""
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), psutil.Process().create_time(), this_job())

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        return process if self.job is None else f"job {self.job} ({process})"


class Claim:
    """This process's claim to a run: ``check``, ``hold``, and ``release`` at the end. ``note`` shows a line."""

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self.before: Owner | None = None
        """Who had the run last, known after ``check``."""
        self.lost: Owner | None = None
        """Who took it over meanwhile."""
        self._path, self._note = path, note
        self._place = place_of_record(path)
        self._own = Owner.of_this_process()
        self._renewing: threading.Thread | None = None
        self._done = threading.Event()

    def check(self) -> None:
        """Raises ConfigError that names who works on the run, if somebody does."""
        owner = self.before = read_owner(self._place)
        if owner is None or owner.ended:
            return
        if owner.host == self._own.host:
            alive = _is_alive(owner)
        else:
            self._note(f"{self._place} was {owner}'s last: waiting {SILENT_SECONDS:.0f} s at most for a sign of it")
            alive = self._renews(owner)
        if alive:
            stop = f"lightning-ray stop {owner.job}" if owner.job else f"kill {owner.pid}"
            raise ConfigError(f"{self._place} is worked on by {owner}: stop it ({stop}), or take another --name")

    def hold(self) -> None:
        """Take the run, and renew the record from now on."""
        self._place.write(RECORD, _packed(self._own))
        self._renewing = threading.Thread(target=self._renew, name="claim to the run", daemon=True)
        self._renewing.start()

    def mark_place(self) -> None:
        """Note in the place of a URL that it is worked on here."""
        (self._path / WRITER).write_text(self._own.writer)

    def verify(self) -> None:
        """Raises InfrastructureError if another process took the run over."""
        if self.lost is not None:
            raise InfrastructureError(f"{self._place} was taken over by {self.lost}; this run ends, and writes no more")

    def release(self) -> None:
        """Mark the end, if it was held."""
        if self._renewing is None:
            return
        self._done.set()
        self._renewing.join(RENEW_SECONDS)
        if self.lost is None:
            try:
                self._place.write(RECORD, _packed(replace(self._own, ended=True)))
            except Exception as error:  # who comes next finds out by itself
                self._note(f"{self._place}/{RECORD} could not be marked as ended: {error}")

    def _renew(self) -> None:
        while not self._done.wait(RENEW_SECONDS):
            try:
                owner = read_owner(self._place)
                if owner is not None and owner.writer != self._own.writer:
                    self.lost = owner
                    return
                self._own = replace(self._own, beat=self._own.beat + 1)
                self._place.write(RECORD, _packed(self._own))
            except Exception:  # a storage that does not answer is told of by who mirrors
                continue

    def _renews(self, owner: Owner) -> bool:
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_SECONDS))
            now = read_owner(self._place)
            if now is None or now.ended:
                return False
            if now != owner:
                return True
        return False


def place_of_record(path: Path) -> RemoteFolder:
    """Where a run's record is."""
    return RemoteFolder(url_of(path) or f"file://{path.absolute()}")


def read_owner(place: RemoteFolder) -> Owner | None:
    """Who had the run last; None of a run that nobody claimed."""
    text = place.read(RECORD)
    try:
        return None if text is None else Owner(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}/{RECORD} is damaged ({error}): remove it if nobody works on the run") from None


def written_here(path: Path) -> bool:
    """Whether the place of a URL is where who wrote there last worked: it is as new, or newer."""
    writer = path / WRITER
    if not writer.is_file():
        return False
    owner = read_owner(place_of_record(path))
    return owner is None or owner.writer == writer.read_text()


def _is_alive(owner: Owner) -> bool:
    try:
        return abs(psutil.Process(owner.pid).create_time() - owner.process_began) < 1.0
    except psutil.NoSuchProcess:
        return False


def _packed(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=2) + "\n").encode()
