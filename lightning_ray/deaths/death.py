"""A death in one sentence: who, why, what was lost, what happens next."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.deaths.evidence import Evidence, exits, gathered
from lightning_ray.deaths.process import Process
from lightning_ray.deaths.told import WORDLESS, Told, told_of

AFTERMATH: Mapping[str, tuple[str, str]] = {
    "runner": ("no rollout", "what it played is played again by others, and a fresh runner takes its place"),
    "span store": ("nothing that it acknowledged", "Ray starts it again; calls wait for it meanwhile"),
    "policy replica": (
        "no rollout",
        "Serve starts another, which answers once it has proved the weights; calls go to the others meanwhile",
    ),
    "trainer rank": ("the steps since the last checkpoint", "the ranks are started anew from it"),
    "relay": ("no rollout", "Serve starts another; calls that it had not answered are sent again by their clients"),
    "Serve's controller": ("nothing", "Ray starts it again; replicas answer meanwhile"),
    "Serve's proxy": ("answers on their way", "Serve starts another; clients send their calls again"),
    "node": ("what ran on it", "its parts are started again where there is room"),
    "Ray": ("the rollouts at work", "start the run again with --resume: it goes on from its last checkpoint"),
}
"""By role: what is lost, and what happens next."""
SHORT_OF_MEMORY = {
    "runner": "fewer rollouts at once (concurrency) take less memory",
    "policy replica": "a smaller engine.kv_cache_memory_mb or engine.max_model_len takes less memory",
    "trainer rank": "more ranks or a smaller algorithm.micro_batch_tokens take less memory each",
}
"""By role: what to change when it was killed for want of memory."""


@dataclass(frozen=True)
class Death:
    """What a person is told of an end, and events.jsonl keeps."""

    process: Process
    cause: str
    lost: str
    next: str
    during: str = ""
    """The call that it did not answer."""
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        during = f" during {self.during!r}" if self.during else ""
        place = f" ({self.process.place})" if self.process.place else ""
        then = f"{self.next[:1].upper()}{self.next[1:]}"
        return f"{self.process} died{during}{place}: {self.cause}. Lost: {self.lost}. {then}."

    def event(self) -> dict[str, Any]:
        """Its line of events.jsonl."""
        process = self.process
        return {
            "time": round(self.time, 3),
            "kind": "death",
            "role": process.role,
            "name": process.name,
            "node": process.node,
            "pid": process.pid,
            "cause": self.cause,
            "lost": self.lost,
            "next": self.next,
        }


def death_of(
    process: Process, error: BaseException | str | Told, evidence: Evidence | None = None, during: str = ""
) -> Death:
    """Tell a death by what Ray says of it and what the node of the process shows, which is asked for if not given.

    Takes some ten seconds at most, where another node is to be asked; call it in a thread.
    """
    told = error if isinstance(error, Told) else told_of(error)
    if evidence is None:
        evidence = Evidence() if told.kind in ("error", "node", "killed") else gathered(process)
    if process.pid is not None:
        exits.forget(process.pid)
    lost, then = AFTERMATH[process.role]
    if (advice := SHORT_OF_MEMORY.get(process.role)) and short_of_memory(process, told, evidence):
        then = f"{then}; {advice}"
    return Death(process, cause_in_words(process, told, evidence), lost, then, during)


def short_of_memory(process: Process, told: Told, evidence: Evidence) -> bool:
    """Whether want of memory killed it, as far as that is known."""
    if told.kind == "memory monitor":
        return True
    kills = _kills_since(process, evidence)
    return told.kind == "wordless" and bool(kills) and evidence.exit in (None, "killed by SIGKILL")


def cause_in_words(process: Process, told: Told, evidence: Evidence) -> str:
    """Why, and the last lines of the log, if there are any."""
    if evidence.node_died and told.kind in ("wordless", "lost"):
        return f"its node died, and {evidence.missing}"
    why = _wordless(process, told, evidence) if told.kind == "wordless" else told.words
    said = f"; last lines of its log: {evidence.words}" if evidence.words else ""
    return f"{why}{said}{f' ({evidence.missing})' if evidence.missing else ''}"


def _wordless(process: Process, told: Told, evidence: Evidence) -> str:
    """The end of a process that Ray knows nothing of."""
    if short_of_memory(process, told, evidence):
        return "killed by the kernel for want of memory (its count of such kills on the node has risen)"
    if evidence.exit == "killed by SIGKILL":
        known = _kills_since(process, evidence) == 0
        return f"killed by SIGKILL{', not for want of memory' if known else ', by hand or for want of memory'}"
    if evidence.exit is not None:
        return f"it {evidence.exit}" if evidence.exit.startswith("exited") else evidence.exit
    return WORDLESS if evidence.words or evidence.missing else f"{WORDLESS}: SIGKILL, by hand or for want of memory"


def _kills_since(process: Process, evidence: Evidence) -> int | None:
    """Memory kills on its node while it lived."""
    if process.memory_kills is None or evidence.memory_kills is None:
        return None
    return evidence.memory_kills - process.memory_kills
