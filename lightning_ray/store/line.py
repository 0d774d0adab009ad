"""A direct line to the store's process: its messages over a socket of the same machine, without Ray in between.

A message through Ray costs some milliseconds of CPU on both sides, whatever it carries, over a socket a tenth. Where
there is no line (another machine, another system than Linux) and when one breaks, messages go through Ray: it starts
the store again, and every call may be resent. The socket's name is the kernel's, so nothing is left behind; only
processes of the same user are let in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import count
from typing import Any, cast

import msgpack
import pyarrow as pa

Answer = tuple[bytes, list[pa.Buffer]]
"""An answer's message and its buffers."""

Envelope = tuple[bytes, float | None, int]
"""A call: its message, how long it may wait inside the store, and how many of the buffers are its own."""

Calls = Callable[[Sequence[Envelope], list[pa.Buffer]], Awaitable[list[Answer]]]

AGAIN_SECONDS = 30.0
"""After a line could not be opened."""
REOPEN_SECONDS = 0.5
"""From one line to the next."""
logger = logging.getLogger(__name__)

_SIZES = struct.Struct("<IQ")
"""Bytes of a frame's head and of its body."""


class LineLost(Exception):
    """The other side is gone; what was sent may have been done or not."""


class Frames(asyncio.Protocol):
    """Frames over a connection: a head of msgpack and the bytes of some buffers."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        start = 0
        while len(self._received) - start >= _SIZES.size:
            head, body = _SIZES.unpack_from(self._received, start)
            end = start + _SIZES.size + head + body
            if len(self._received) < end:
                break
            split = start + _SIZES.size + head
            with memoryview(self._received) as view:
                number, content, sizes = msgpack.unpackb(view[start + _SIZES.size : split])
                arrived = pa.py_buffer(bytes(view[split:end]))
            self.arrived(number, content, list(_parts(arrived, sizes)))
            start = end
        del self._received[:start]

    def arrived(self, number: int, content: Any, buffers: list[pa.Buffer]) -> None:
        """A frame is here."""

    def write(self, number: int, content: Any, buffers: Sequence[pa.Buffer]) -> None:
        """Send a frame. Raises LineLost."""
        if self.transport is None or not self.is_open:
            raise LineLost("the line to the store is closed")
        sizes = [buffer.size for buffer in buffers]
        head = msgpack.packb([number, content, sizes])
        self.transport.writelines(
            [_SIZES.pack(len(head), sum(sizes)) + head, *(memoryview(buffer) for buffer in buffers)]
        )

    @property
    def is_open(self) -> bool:
        """Whether frames can be sent."""
        return self.transport is not None and not self.transport.is_closing()

    def close(self) -> None:
        """Hang up."""
        if self.transport is not None:
            self.transport.close()


class Line(Frames):
    """The client's end."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[list[Answer]]] = {}

    def send(self, envelopes: Sequence[Envelope], buffers: Sequence[pa.Buffer]) -> asyncio.Future[list[Answer]]:
        """Send a message; its answers. Raises LineLost, now or later."""
        number = next(self._numbers)
        self.write(number, envelopes, buffers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        return answer

    def arrived(self, number: int, content: Any, buffers: list[pa.Buffer]) -> None:
        answer = self._waiting.pop(number)
        if answer.done():
            return
        if isinstance(content, str):
            answer.set_exception(RuntimeError(content))
            return
        rest = iter(buffers)
        answer.set_result([(message, [next(rest) for _ in range(own)]) for message, own in content])

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(LineLost(f"the line to the store broke: {error or 'its process ended'}"))
        self._waiting.clear()


class _Door(Frames):
    """The store's end of one connection."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if _user_of(transport.get_extra_info("socket")) != os.getuid():
            self.close()

    def arrived(self, number: int, content: Any, buffers: list[pa.Buffer]) -> None:
        task = asyncio.ensure_future(self._answer(number, content, buffers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, envelopes: list[Envelope], buffers: list[pa.Buffer]) -> None:
        try:
            answers = await self._calls(envelopes, buffers)
        except Exception as error:
            content, given = f"{type(error).__name__}: {error}", []
        else:
            content = [(message, len(own)) for message, own in answers]  # type: ignore[assignment]
            given = [buffer for _, own in answers for buffer in own]
        if self.transport is not None:
            self.write(number, content, given)


class LineServer:
    """Where lines arrive: in the store's process and event loop."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._server: asyncio.Server | None = None
        self._name: str | None = None

    async def address(self) -> str | None:
        """The socket's name, opened with the first call; None where there can be none."""
        if sys.platform != "linux":
            return None
        if self._name is None:
            self._name = f"lightning-ray-store-{secrets.token_hex(16)}"
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: _Door(self._calls), f"\0{self._name}")
        return self._name

    def close(self) -> None:
        """No more lines; those that are open stay until their process ends."""
        if self._server is not None:
            self._server.close()


class Dialer:
    """Has a line to the store of a Ray handle, where there can be one; asks for it when it is first needed."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._line: Line | None = None
        self._opening: asyncio.Task[None] | None = None
        self._not_before = 0.0

    def line(self) -> Line | None:
        """The line if it stands; otherwise one is opened meanwhile, for later calls."""
        if self._line is not None and self._line.is_open:
            return self._line
        if (self._opening is None or self._opening.done()) and time.monotonic() >= self._not_before:
            self._opening = asyncio.ensure_future(self._open())
        return None

    async def _open(self) -> None:
        self._not_before = time.monotonic() + AGAIN_SECONDS
        try:
            address = await self._handle.line.remote()
            if address is not None:
                self._line = await _connect(address)
                self._not_before = time.monotonic() + REOPEN_SECONDS
        except Exception as error:  # it is on another machine, or just died: Ray knows more
            logger.debug("no line to the store: %s", error)


async def _connect(address: str) -> Line:
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, f"\0{address}")  # uvloop's own way knows no names of the kernel
        _, line = await loop.create_unix_connection(Line, sock=connection)
    except BaseException:
        connection.close()
        raise
    return line


def _parts(whole: pa.Buffer, sizes: Iterable[int]) -> Iterable[pa.Buffer]:
    start = 0
    for size in sizes:
        yield whole.slice(start, size)
        start += size


def _user_of(connection: Any) -> int:
    """Whose process is at the other end."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)
