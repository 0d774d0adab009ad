"""The last lines that a process wrote, without what is of no use to a reader."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LINES = 8
FRAMES = 4
"""Kept of the stack that Python's fault handler writes."""
CHARACTERS = 800
FAILED_CHECK = "Health check failed: "
"""How the line begins in which a replica says why Serve is to end it, which takes its time and more lines for that."""
_FATAL = "Fatal Python error: "
_NOISE = re.compile(r"^(:actor_name:|:job_id:|:task_name:|Extension modules: |\s*$)")


def last_words(text: str) -> str:
    """In one line; empty if there is nothing."""
    lines = [line.strip() for line in text.splitlines() if not _NOISE.match(line)]
    fatal = next((place for place in reversed(range(len(lines))) if lines[place].startswith(_FATAL)), None)
    if fatal is None:
        failed = [line for line in lines[-4 * LINES :] if line.startswith(FAILED_CHECK)]
        kept = failed[-1:] or lines[-LINES:]
    else:
        frames = [line for line in lines[fatal + 1 :] if line.startswith("File ")][:FRAMES]
        kept = [*lines[max(0, fatal - LINES) : fatal + 1], *frames]
    return " | ".join(kept)[-CHARACTERS:]


@contextmanager
def failure_written() -> Iterator[None]:
    """Has a replica write why its health check fails: Serve itself writes that it failed, not why."""
    try:
        yield
    except Exception as error:
        print(f"{FAILED_CHECK}{error}", file=sys.stderr, flush=True)
        raise
