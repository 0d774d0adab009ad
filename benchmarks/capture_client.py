"""Clients of the capture benchmark: connections that are kept, in a process of their own, as cheap as can be.

Runs as a Ray actor. A connection sends a request that was made before and reads its answer by length or chunks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple, cast
from urllib.parse import urlsplit


class Window(NamedTuple):
    """Some calls: how long each took, until its first byte and in all, and how long all took together."""

    first_byte: list[float]
    total: list[float]
    seconds: float


class Client:
    """Sends requests, ``at_once`` of them at any time."""

    async def calls(self, requests: Sequence[bytes], at_once: int, count: int) -> Window:
        """``count`` calls, of each request in turn; every answer must be a 200."""
        connections = await asyncio.gather(*(connect(requests[0]) for _ in range(at_once)))
        window = Window([], [], 0.0)
        left = iter(range(count))

        async def work(connection: Connection) -> None:
            for number in left:
                await connection.ask(requests[number % len(requests)])
                window.first_byte.append(connection.first_byte - connection.sent)
                window.total.append(connection.ended - connection.sent)

        began = time.perf_counter()
        await asyncio.gather(*(work(connection) for connection in connections))
        seconds = time.perf_counter() - began
        for connection in connections:
            connection.close()
        return window._replace(seconds=seconds)

    async def burst(self, requests: Sequence[bytes]) -> list[bytes]:
        """All requests at once, each over its own connection; the bodies of the answers."""
        connections = await asyncio.gather(*(connect(request) for request in requests))
        bodies = await asyncio.gather(*(c.ask(request) for c, request in zip(connections, requests, strict=True)))
        for connection in connections:
            connection.close()
        return bodies


def request_of(url: str, key: str, body: bytes) -> bytes:
    """A POST of JSON."""
    parts = urlsplit(url)
    return (
        f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def connect(request: bytes) -> Connection:
    """A connection to where a request goes."""
    host, _, port = request.partition(b"host: ")[2].partition(b"\r\n")[0].decode().partition(":")
    _, connection = await asyncio.get_running_loop().create_connection(Connection, host, int(port))
    return connection


class Connection(asyncio.Protocol):
    """One connection, for one request after the other."""

    def __init__(self) -> None:
        self.sent = self.first_byte = self.ended = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._received = bytearray()

    async def ask(self, request: bytes) -> bytes:
        """Send a request; the body of its answer, chunks as they came. Raises RuntimeError unless it is a 200."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._received.clear()
        self.first_byte = 0.0
        self.sent = time.perf_counter()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RuntimeError(f"the connection was lost amid a call: {error}"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        split = self._received.find(b"\r\n\r\n") + 4
        if split < 4 or len(self._received) == split or self._answer is None:
            return
        if not self.first_byte:
            self.first_byte = time.perf_counter()
        head = bytes(self._received[:split]).lower()
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        ended = len(self._received) >= split + int(length) if length else self._received.endswith(b"\r\n0\r\n\r\n")
        if ended and not self._answer.done():
            self.ended = time.perf_counter()
            self._end(head, bytes(self._received[split:]))

    def _end(self, head: bytes, body: bytes) -> None:
        assert self._answer is not None
        if head.split(b" ", 2)[1] == b"200":
            self._answer.set_result(body)
        else:
            self._answer.set_exception(RuntimeError(f"{head.split(chr(13).encode())[0]!r}: {body[:300]!r}"))
