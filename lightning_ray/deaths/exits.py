"""How processes of this machine ended that are not our children: exit code or signal.

Ray's raylet does not wait for its workers, so nobody is told their status; Linux from 6.15 on tells it to whoever held
a pidfd while the process lived. Elsewhere the answer is None.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys

_INFO = struct.Struct("=QQ11Ii")
"""``struct pidfd_info`` in its first form: mask, cgroup, eleven ids, wait status (linux/pidfd.h)."""
_GET_INFO = (3 << 30) | (_INFO.size << 16) | (0xFF << 8) | 11
_EXIT = 1 << 3
"""The bit of the mask that asks for, and vouches for, the status."""


class Exits:
    """Of processes that it was told of while they lived."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}

    def hold(self, pid: int) -> None:
        """Remember a process of this machine, to know its end."""
        if pid in self._held or not sys.platform.startswith("linux"):
            return
        try:
            self._held[pid] = os.pidfd_open(pid)
        except OSError:  # gone already, or not to be had
            return

    def of(self, pid: int) -> str | None:
        """``killed by SIGKILL``, ``exited with code 3``; None while it lives and where it is not known."""
        held = self._held.get(pid)
        if held is None:
            return None
        answer = bytearray(_INFO.pack(_EXIT, *([0] * 13)))
        try:
            fcntl.ioctl(held, _GET_INFO, answer)
        except OSError:
            return None
        mask, *_, status = _INFO.unpack(answer)
        return in_words(status) if mask & _EXIT else None

    def forget(self, pid: int) -> None:
        """Its end was told."""
        if (held := self._held.pop(pid, None)) is not None:
            os.close(held)

    def close(self) -> None:
        """Forget all."""
        for pid in list(self._held):
            self.forget(pid)


def in_words(status: int) -> str:
    """A wait status."""
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
