"""What a program prints: always read, so that it never blocks, and kept within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque

KEPT_BYTES = 32 * 1024
"""Kept of the beginning, and as much of the end."""
READ_BYTES = 64 * 1024


class BoundedText:
    """The beginning and the end of a stream of bytes."""

    def __init__(self, kept_bytes: int = KEPT_BYTES):
        self._kept = kept_bytes
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self.total_bytes = 0

    def add(self, data: bytes) -> None:
        """Append."""
        self.total_bytes += len(data)
        room = self._kept - len(self._head)
        self._head += data[:room]
        if rest := data[room:]:
            self._tail.append(rest)
            self._tail_bytes += len(rest)
            while self._tail_bytes - len(self._tail[0]) >= self._kept:
                self._tail_bytes -= len(self._tail.popleft())

    def text(self) -> str:
        """The text, with a note of how much was cut out; bytes that are no UTF-8 are replaced."""
        tail = b"".join(self._tail)[-self._kept :]
        cut = self.total_bytes - len(self._head) - len(tail)
        head = bytes(self._head)
        if not cut:
            return (head + tail).decode(errors="replace")
        note = f"\n[... {cut} bytes cut ...]\n"
        return head.decode(errors="replace") + note + tail.decode(errors="replace")


class Drain:
    """Reads a pipe to its end."""

    def __init__(self) -> None:
        """Opens the pipe; ``write_end`` is for the program, and the caller closes it."""
        self.kept = BoundedText()
        self._loop = asyncio.get_running_loop()
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._read_end, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._read_end, READ_BYTES)
        except BlockingIOError:
            return
        if data:
            self.kept.add(data)
        else:
            self.close()

    async def end(self, timeout_seconds: float) -> None:
        """Wait for the end, but not for a stray process that holds the other end open."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ended), timeout_seconds)
        self.close()

    def close(self) -> None:
        """Read no more."""
        if not self._ended.done():
            self._loop.remove_reader(self._read_end)
            os.close(self._read_end)
            self._ended.set_result(None)
