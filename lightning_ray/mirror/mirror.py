"""A run's mirror: a thread that copies the run's folder to its URL beside the training; checkpoints wait for it.

A storage that fails is told of once, and tried again. The run does not end of it before its own end: then it is an
error that names what is not at the URL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from lightning_ray.errors import InfrastructureError
from lightning_ray.mirror.claim import Claim
from lightning_ray.mirror.copying import RunCopy
from lightning_ray.mirror.place import url_of
from lightning_ray.threads import in_thread

APART_SECONDS = 10.0
"""From the beginning of one round to the next, where nobody waits."""
QUIET_SECONDS = 60.0
"""After which there is a round though nothing was told."""
RETRY_SECONDS = (5.0, 15.0, 30.0, 60.0)
SILENT_SECONDS = 600.0
"""That no file comes to its end, before a checkpoint, or the end of the run, waits no longer for them."""
NAMED = 5
"""Files that an error names, of those that are missing."""


class Mirror:
    """See the module. ``note`` shows a line to a person."""

    def __init__(self, path: Path, claim: Claim, note: Callable[[str], None]) -> None:
        self.copy = RunCopy(path)
        self.url = str(self.copy.remote)
        self._path, self._claim, self._note = path, claim, note
        self._changed = threading.Condition()
        self._asked = self._made = 0
        """Rounds that were asked for, by number, and that were made."""
        self._told = self._ending = False
        self.lacking: str | None = None
        """What is not at the URL at the end, and why."""
        self._failure: Exception | None = None
        """Of the last round, if it failed."""
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    @classmethod
    def of(cls, path: Path, claim: Claim, note: Callable[[str], None]) -> Mirror | None:
        """The mirror of a run at a URL, at work; None for one in a folder."""
        if url_of(path) is None:
            return None
        mirror = cls(path, claim, note)
        mirror._thread.start()
        return mirror

    def tell(self) -> None:
        """Something changed: it is sent soon."""
        with self._changed:
            self._told = True
            self._changed.notify_all()

    def ask(self) -> None:
        """What is there now is to be sent at once; ``settled`` waits for it."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    async def settled(self, what: str) -> None:
        """Wait until what was asked for is at the URL, as long as files are sent and the storage does not fail. A note
        tells if ``what`` is not there. Raises InfrastructureError if another process took the run over.
        """
        self._claim.verify()
        if not await in_thread(self._wait, SILENT_SECONDS, False):
            because = self._failure or f"nothing was sent for {SILENT_SECONDS:.0f} s"
            self._note(f"{what} is not at {self.url} yet: {because}; the run goes on")

    async def finish(self, seconds: float = SILENT_SECONDS) -> None:
        """Send the rest, as long as files are sent. What is not there then is told."""
        self._ending = True
        self.ask()
        if await in_thread(self._wait, seconds, True):
            self._note(f"all of it is at {self.url}")
            return
        missing = self.copy.missing()
        named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        because = self._failure or f"nothing was sent for {seconds:.0f} s"
        self.lacking = f"{self.url} lacks {named}: {because}. All of it is in {self._path}"
        self._note(self.lacking)

    def verify(self) -> None:
        """Raises InfrastructureError if not all is there, after ``finish``, or another process took the run over."""
        self._claim.verify()
        if self.lacking is not None:
            raise InfrastructureError(f"{self.lacking}; --resume on this node sends it")

    def _wait(self, seconds: float, through_failures: bool) -> bool:
        with self._changed:
            wanted, began = self._asked, time.monotonic()

            def over() -> bool:
                return self._made >= wanted or (self._failure is not None and not through_failures)

            while (left := max(began, self.copy.last_sent) + seconds - time.monotonic()) > 0:
                if self._changed.wait_for(over, left):
                    break
            return self._made >= wanted

    def _work(self) -> None:
        failures, began = 0, float("-inf")
        while True:
            self._pause(began + APART_SECONDS, failures)
            began = time.monotonic()
            with self._changed:
                wanted, self._told = self._asked, False
            try:
                self._claim.verify()
                self.copy.round()
            except Exception as error:
                failures += 1
                self._failed(error, failures)
                continue
            self._succeeded(wanted, failures)
            failures = 0
            if self._ending and self._made >= self._asked:
                return

    def _pause(self, not_before: float, failures: int) -> None:
        """Until there is something to send, and it is time; after a failure for a while."""
        with self._changed:
            if failures:
                retry = RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1]
                self._changed.wait_for(lambda: False, retry)
                return
            self._changed.wait_for(lambda: self._told or self._asked > self._made, QUIET_SECONDS)
            self._changed.wait_for(lambda: self._asked > self._made, max(0.0, not_before - time.monotonic()))

    def _failed(self, error: Exception, failures: int) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        if failures == 1:
            self._note(
                f"{self.url} is not kept up: {type(error).__name__}: {error}; it is tried again, the run goes on"
            )

    def _succeeded(self, made: int, failures: int) -> None:
        with self._changed:
            self._made, self._failure = made, None
            self._changed.notify_all()
        if failures:
            self._note(f"{self.url} is kept up again")
