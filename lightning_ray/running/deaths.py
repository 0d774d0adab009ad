"""Why a runner died: what Ray says of it, and its last words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ray.running.last_words import last_words

LOG_BYTES = 8192
MAX_SHOWN = 600
_EXIT = re.compile(r"Worker exit type: (\w+)")
_DETAIL = re.compile(r"Worker exit detail: (.+)", re.DOTALL)
_LOST_CONNECTION = "connection error code 2"
_WORDLESS = "its process ended without a word to Ray"


def death_reason(error: BaseException, info: Mapping[str, Any] | None) -> str:
    """In one line: the exit that Ray tells, and what the process wrote last, if its log is on this machine.

    For an exception of the runner itself, its words.
    """
    if isinstance(cause := getattr(error, "cause", None), BaseException):
        return f"{type(cause).__name__}: {cause}"[:MAX_SHOWN]
    told = _told(error)
    where = f" (process {info['pid']})" if info is not None else ""
    said = _log_end(info["log"]) if info is not None and info.get("log") else ""
    if said:
        return f"{told}{where}; last lines of its log: {said}"
    guess = ": SIGKILL, by hand or for want of memory" if told == _WORDLESS and info is not None else ""
    return f"{told}{guess}{where}"


def _told(error: BaseException) -> str:
    text = str(error)
    kind = _EXIT.search(text)
    if kind is None:
        return next((line.strip() for line in text.splitlines()[::-1] if line.strip()), type(error).__name__)[
            :MAX_SHOWN
        ]
    detail = _DETAIL.search(text)
    words = " ".join(detail.group(1).split()) if detail else ""
    return _WORDLESS if _LOST_CONNECTION in words else f"{kind.group(1)}: {words}"[:MAX_SHOWN]


def _log_end(log: str) -> str:
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, Path(log).stat().st_size - LOG_BYTES))
            return last_words(file.read().decode(errors="replace"))
    except OSError:
        return ""
