"""What happens to a run beside its steps: deaths, waits that take long. Told to a person, and kept in events.jsonl."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ray.deaths import Death

EVENTS = "events.jsonl"


class Events:
    """Of one run. May be told from any thread.

    Args:
        folder: of the run; without one nothing is kept.
        note: shows a line to a person.
    """

    def __init__(self, folder: Path | None = None, note: Callable[[str], None] | None = None):
        self._file = None if folder is None else folder / EVENTS
        self._note = note
        self._lock = threading.Lock()
        self._dead: set[tuple[str, str | None, int]] = set()
        """Role, node and process of those whose death was told: several calls may find the same."""

    def death(self, death: Death, shown: bool = True) -> None:
        """A part died; told once. ``shown`` is false where the message of an error says so already."""
        process = death.process
        if process.pid is not None:
            who = process.role, process.node, process.pid
            with self._lock:
                if who in self._dead:
                    return
                self._dead.add(who)
        if shown:
            self._show(str(death))
        self._keep(death.event())

    def waiting(self, what: str, lines: Sequence[str]) -> None:
        """Something takes long; a line for each part that is at work."""
        self._show("\n  ".join([what, *lines]))
        self._keep({"time": round(time.time(), 3), "kind": "waiting", "what": what, "parts": list(lines)})

    def _show(self, text: str) -> None:
        if self._note is not None:
            self._note(text)

    def _keep(self, event: dict[str, Any]) -> None:
        if self._file is None:
            return
        with self._lock, self._file.open("a") as file:
            file.write(json.dumps(event) + "\n")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's events.jsonl, oldest first."""
    file = folder / EVENTS
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]
