"""What Ray says of an actor's end, read from its words: there is no other account of it.

Ray 2.60 tells a process's exit as ``Worker exit type: TYPE Worker exit detail: ...``, where a connection that closed
(error code 2) is all it knows of SIGKILL, a crash or ``os._exit``: it does not wait for its workers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["wordless", "memory monitor", "node", "killed", "exit", "error", "lost"]
"""``wordless``: the process was gone, and nobody knows why; ``killed``: by ``ray.kill``, so by the run or by Serve;
``error``: what the actor itself raised; ``lost``: Ray knows no more than that it does not answer."""
MAX_SHOWN = 600
_EXIT = re.compile(r"Worker exit type: (\w+)")
_DETAIL = re.compile(r"Worker exit detail: (.+)", re.DOTALL)
_CODE = re.compile(r"exit code (-?\d+)")
_MEMORY = re.compile(r"Memory on the node.*?was (\S+ ?used / \S+ ?limit)", re.DOTALL)
_NODE = re.compile(r"the actor's node was ([^\n]+)")
WORDLESS = "its process ended without a word to Ray"


@dataclass(frozen=True)
class Told:
    """A kind of end, and Ray's words for it, in one line."""

    kind: Kind
    words: str


def told_of(error: BaseException | str) -> Told:
    """What an exception of a call, or the text of one, says of the end of who was called."""
    cause = None if isinstance(error, str) else _raised(error)
    if cause is not None:
        return Told("error", f"{type(cause).__name__}: {cause}"[:MAX_SHOWN])
    text = str(error)
    if "NODE_OUT_OF_MEMORY" in text or "memory pressure" in text or "running low on memory" in text:
        used = _MEMORY.search(text)
        figures = f": {' '.join(used.group(1).split())}" if used else ""
        return Told("memory monitor", f"killed by Ray's memory monitor, as its node was short of memory{figures}")
    if "its node has died" in text or "NODE_DIED" in text:
        how = _NODE.search(text)
        return Told("node", f"its node died{f': {how.group(1)}' if how else ''}"[:MAX_SHOWN])
    if "ray.kill" in text or "INTENDED_SYSTEM_EXIT" in text:
        return Told("killed", "killed by ray.kill")
    if "is temporarily unavailable" in text:
        return Told("lost", "it no longer answers")
    return _exit_told(text) or Told("lost", _last_line(text) or type(error).__name__)


def _raised(error: BaseException) -> BaseException | None:
    """What the actor itself raised, if that is what the caller got."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else None


def _exit_told(text: str) -> Told | None:
    kind, detail = _EXIT.search(text), _DETAIL.search(text)
    if kind is None:
        return None
    words = " ".join(detail.group(1).split()) if detail else ""
    if "connection error code 2" in words:
        return Told("wordless", WORDLESS)
    if (code := _CODE.search(words)) is not None:
        return Told("exit", f"it exited with code {code.group(1)}")
    return Told("exit", f"{kind.group(1)}: {words}"[:MAX_SHOWN])


def _last_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines()[::-1] if line.strip()), "")[:MAX_SHOWN]


def told_by_table(cause: Any) -> Told:
    """What Ray's actor table says: the ``DeathCause`` of an actor there."""
    context = cause.WhichOneof("context")
    if context is None:
        return Told("lost", "")
    if context == "oom_context":
        return told_of(f"NODE_OUT_OF_MEMORY {cause.oom_context.error_message}")
    if context == "actor_died_error_context":
        died = cause.actor_died_error_context
        if died.reason in (died.RAY_KILL, died.OUT_OF_SCOPE, died.REF_DELETED):
            return Told("killed", "killed by ray.kill")
        return told_of(died.error_message)
    if context == "creation_task_failure_context":
        return Told("error", _last_line(cause.creation_task_failure_context.formatted_exception_string))
    return Told("lost", _last_line(getattr(cause, context).error_message))
