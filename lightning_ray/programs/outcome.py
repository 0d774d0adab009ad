"""How a program ended: the facts, their words, and whose fault a bad end is."""

from __future__ import annotations

import signal as signals
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_ray.errors import AgentError, InfrastructureError

PROGRAM_SPAN = "lightning_ray.program"
"""Name of the span with a program's command, end and output."""
LAST_LINES = 20
LAST_CHARACTERS = 2000
ENGINE_FAILED = 125
KILLED = 128 + signals.SIGKILL
"""Exit code with which a shell or a container engine reports SIGKILL."""


@dataclass(frozen=True)
class Outcome:
    """A program that has ended; handed to a reward function."""

    exit_code: int | None
    """None if a signal ended it."""
    stdout: str
    """Its beginning and end, with a note of what was cut out."""
    stderr: str
    files: Path
    """The folder it worked in, with what it left there."""
    duration_s: float
    signal: str | None = None
    """``SIGSEGV``, for example."""
    timed_out: bool = False
    """It was ended after ``timeout_seconds``."""
    cpu_s: float = 0.0
    max_rss_bytes: int = 0
    killed_from_outside: bool = False
    """By SIGKILL, which neither its agent's limits nor its runner sent: for want of memory, as a rule."""
    cpu_limit_s: int | None = None

    @property
    def ok(self) -> bool:
        """Whether it exited with 0, in time."""
        return self.exit_code == 0 and not self.timed_out

    @property
    def words(self) -> str:
        """``exited with code 3 after 0.2 s``."""
        if self.timed_out:
            return f"ran longer than timeout_seconds and was ended after {self.duration_s:.1f} s"
        how = f"exited with code {self.exit_code}" if self.signal is None else f"was ended by {self.signal}"
        if self.signal == "SIGXCPU" or (self.signal == "SIGKILL" and not self.killed_from_outside and self.cpu_limit_s):
            how += f", having used its cpu_seconds={self.cpu_limit_s}"
        return f"{how} after {self.duration_s:.1f} s"

    def attributes(self) -> dict[str, Any]:
        """As attributes of the program's span."""
        found = {
            "exit_code": self.exit_code,
            "signal": self.signal,
            "timed_out": self.timed_out,
            "duration_s": self.duration_s,
            "cpu_s": self.cpu_s,
            "max_rss_bytes": self.max_rss_bytes,
            "stdout": self.stdout,
            "stderr": self.stderr,
        }
        return {f"{PROGRAM_SPAN}.{key}": value for key, value in found.items() if value is not None}

    def with_code(self, code: int) -> Outcome:
        """Ended with a code, or by a signal if it is negative."""
        if code >= 0:
            return replace(self, exit_code=code)
        return replace(self, exit_code=None, signal=signal_name(-code))


def signal_name(number: int) -> str:
    """``SIGSEGV`` for 11."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def check_infrastructure(command: str, outcome: Outcome, in_container: bool) -> None:
    """Raises InfrastructureError for an end that no program chooses: SIGKILL from outside, a broken engine."""
    if outcome.killed_from_outside:
        raise InfrastructureError(
            f"{command} was killed by SIGKILL after {outcome.duration_s:.1f} s, which its runner did not send: most "
            f"likely this machine ran out of memory (the program's largest process held "
            f"{outcome.max_rss_bytes / 2**20:.0f} MiB){last_lines(outcome)}"
        )
    if in_container and outcome.exit_code == ENGINE_FAILED:
        raise InfrastructureError(f"the container engine could not run {command}{last_lines(outcome)}")


def failure(command: str, outcome: Outcome) -> AgentError:
    """The error of a program that ended badly."""
    return AgentError(f"{command} {outcome.words}{last_lines(outcome)}")


def last_lines(outcome: Outcome) -> str:
    """The end of what it said."""
    name, text = ("stderr", outcome.stderr) if outcome.stderr.strip() else ("stdout", outcome.stdout)
    lines = text.strip()[-LAST_CHARACTERS:].splitlines()[-LAST_LINES:]
    return f"; its {name} ends:\n" + "\n".join(lines) if lines else "; it printed nothing"
