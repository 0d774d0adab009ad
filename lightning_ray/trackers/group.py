"""The trackers of a run, behind one door through which no failure of theirs comes.

metrics.jsonl, TensorBoard and Ray's metrics are always there, and are written at once. Those that were asked for work
in a thread of their own each, as services may be slow. One that cannot be opened is given up; one that fails on a row
gets the next one. Either is told once, with the reason.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_ray.trackers.base import Row, Tracker
from lightning_ray.trackers.choice import Choice, maker, name_of
from lightning_ray.trackers.jsonl import JsonlTracker
from lightning_ray.trackers.tensorboard import TensorBoardTracker

CLOSE_SECONDS = 15.0
"""For those that were asked for to send the rest, at the end of a run."""

Note = Callable[[str], None]
Make = Callable[[], Tracker]


class Trackers:
    """See the module. They are opened by the first row; ``note`` shows a line to a person."""

    def __init__(self, folder: Path, note: Note, asked: Sequence[Choice] = ()):

        def ray_metrics() -> Tracker:
            from lightning_ray.trackers.ray_metrics import RayMetrics

            return RayMetrics(folder.name)

        always: dict[str, Make] = {
            "metrics.jsonl": lambda: JsonlTracker(folder / "metrics.jsonl"),
            "TensorBoard": lambda: TensorBoardTracker(folder / "tensorboard"),
            "Ray metrics": ray_metrics,
        }
        self._note = note
        self._always = [Guarded(name, make, note) for name, make in always.items()]
        self._asked = [Background(Guarded(name_of(choice), maker(choice, folder), note)) for choice in asked]

    def log(self, row: Row) -> None:
        """Give all a row; raises nothing."""
        row = dict(row)
        for guarded in self._always:
            guarded.log(row)
        for background in self._asked:
            background.log(row)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Have all kept; those that do not come to an end in so many seconds are left, and told of."""
        for tracker in self._always:
            tracker.close()
        deadline = time.monotonic() + seconds
        for each in self._asked:
            each.stop()
        for each in self._asked:
            if not each.ended(max(0.0, deadline - time.monotonic())):
                self._note(f"tracker {each.name} did not take all within {seconds:.0f} s of the end; the rest is lost")


class Guarded:
    """One tracker whose failures are told, once, and go no further."""

    def __init__(self, name: str, make: Make, note: Note):
        self.name = name
        self._make = make
        self._note = note
        self._tracker: Tracker | None = None
        self._given_up = False
        self._told = False

    def log(self, row: Row) -> None:
        """Open it, if it is the first row, and give it the row."""
        if self._given_up:
            return
        try:
            if self._tracker is None:
                self._tracker = self._make()
        except Exception as error:
            self._given_up = True
            self._tell("cannot be opened, and gets nothing", error)
            return
        try:
            self._tracker.log(row)
        except Exception as error:
            self._tell(f"did not take {row.get('kind')} {row.get('step')}", error)

    def close(self) -> None:
        """Close it, if it was opened."""
        if self._tracker is None:
            return
        try:
            self._tracker.close()
        except Exception as error:
            self._tell("did not close", error)

    def _tell(self, what: str, error: Exception) -> None:
        if not self._told:
            self._told = True
            self._note(f"tracker {self.name} {what}: {type(error).__name__}: {error}; the run goes on")


class Background:
    """A tracker in a thread of its own, which starts with the first row."""

    def __init__(self, tracker: Guarded):
        self.name = tracker.name
        self._tracker = tracker
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def log(self, row: Row) -> None:
        """Queue a row."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        self._rows.put(row)

    def stop(self) -> None:
        """Have it close behind the last row."""
        self._rows.put(None)

    def ended(self, seconds: float) -> bool:
        """Whether it has closed, at the latest after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _work(self) -> None:
        while (row := self._rows.get()) is not None:
            self._tracker.log(row)
        self._tracker.close()
