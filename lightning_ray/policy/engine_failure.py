"""Why vLLM's engine did not start: of an engine in a process of its own the caller hears only that it ended."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_ray.config import EngineSettings
from lightning_ray.errors import InfrastructureError

LOG_BYTES = 2**20
CHARACTERS = 500
_RAISED = re.compile(
    r"^\([^()]*pid=\d+\) (?:ERROR \S+ \S+ \[[^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception)\b: .*)$", re.MULTILINE
)
"""The end of a traceback that a process of the engine wrote, or logged."""


@contextmanager
def told(settings: EngineSettings) -> Iterator[None]:
    """Raises InfrastructureError with what the engine raised, where a start within fails."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        cause = (raised(_own_log()) if isinstance(error, RuntimeError) else None) or said
        raise InfrastructureError(
            f"vLLM's engine did not start with engine.max_model_len={settings.max_model_len}, "
            f"engine.kv_cache_memory_mb={settings.chosen_kv_cache_mb}, engine.arguments={settings.arguments}: "
            f"{cause[:CHARACTERS]}"
        ) from error


def raised(log: str) -> str | None:
    """What processes of an engine raised, by what they wrote: the first error, and the last, which came of it."""
    found = [line.strip() for line in _RAISED.findall(log)]
    return "; then ".join(dict.fromkeys((found[0], found[-1]))) if found else None


def _own_log() -> str:
    """What this process and its children wrote on standard output and error, where those are files."""
    return "\n".join(map(_end_of, ("/proc/self/fd/1", "/proc/self/fd/2")))


def _end_of(stream: str) -> str:
    try:
        with Path(os.readlink(stream)).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
