"""What a program says over HTTP while it runs: rewards, annotations and messages, recorded in its attempt's trace.

    POST $LIGHTNING_REPORT_URL/reward       {"reward": 0.5}  or  {"reward": {"f1": 0.5, "speed": 1}, "primary": "f1"}
    POST $LIGHTNING_REPORT_URL/annotation   {"step": 1, "tool": {"name": "search"}}
    POST $LIGHTNING_REPORT_URL/message      {"message": "..."}
    Authorization: Bearer $LIGHTNING_REPORT_TOKEN

One small server on loopback for each event loop. Each attempt's token opens it while its program runs. A report is
answered when it is recorded, 204, or refused in plain words.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.emitter import emit_annotation, emit_message, emit_reward
from lightning_ray.errors import AgentError
from lightning_ray.programs.per_loop import PerLoop
from lightning_ray.programs.reward import parse_reward

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 2**20
READ_SECONDS = 30.0
REASONS = {
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    411: "Length Required",
    413: "Content Too Large",
}

logger = logging.getLogger(__name__)


class RefusedError(Exception):
    """A report that is answered with an error."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


@dataclass(eq=False)
class Reports:
    """One attempt's reports."""

    primary_key: str | None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    context: Context = field(default_factory=copy_context)
    """The attempt's: what is emitted in it belongs there."""
    rewards: int = 0
    """How many came."""

    def reward(self, body: Mapping[str, Any]) -> None:
        """Record a reward."""
        if "reward" not in body:
            raise RefusedError(400, f'a reward is {{"reward": 0.5}}; the keys are {sorted(body)}')
        value, primary = parse_reward(dict(body), self.primary_key)
        emit_reward(value, primary_key=primary)
        self.rewards += 1

    def annotation(self, body: Mapping[str, Any]) -> None:
        """Record key-value pairs."""
        emit_annotation(body)

    def message(self, body: Mapping[str, Any]) -> None:
        """Record text."""
        if "message" not in body:
            raise RefusedError(400, f'a message is {{"message": "..."}}; the keys are {sorted(body)}')
        emit_message(body["message"], attributes={key: value for key, value in body.items() if key != "message"})


ROUTES: Mapping[str, Callable[[Reports, Mapping[str, Any]], None]] = {
    "/reward": Reports.reward,
    "/annotation": Reports.annotation,
    "/message": Reports.message,
}


class ReportServer:
    """Listens on a free port of loopback in the running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._socket.setblocking(False)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._attempts: dict[str, Reports] = {}
        self._answering: set[asyncio.Task[None]] = set()
        Context().run(self._loop.add_reader, self._socket, self._accept)

    @property
    def alive(self) -> bool:
        """Whether it listens."""
        return self._socket.fileno() >= 0

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    @contextmanager
    def hearing(self, reports: Reports) -> Iterator[None]:
        """Accept an attempt's reports."""
        self._attempts[reports.token] = reports
        try:
            yield
        finally:
            del self._attempts[reports.token]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                connection.setblocking(False)
                task = self._loop.create_task(self._serve(connection))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_HEAD_BYTES)
        try:
            status, text = await self._answer(reader, writer)
            body = f"{text}\n".encode() if text else b""
            length = f"Content-Length: {len(body)}\r\n" if body else ""
            head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: text/plain; charset=utf-8\r\n{length}"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            await writer.drain()
            if status >= 400:
                writer.write_eof()  # a client still sending reads the answer before the connection is reset
                await asyncio.wait_for(discard(reader), 1.0)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, str]:
        try:
            path, reports, length = await asyncio.wait_for(self._head(reader, writer), READ_SECONDS)
            raw = await asyncio.wait_for(reader.readexactly(length), READ_SECONDS)
            record(reports, path, raw)
        except RefusedError as refused:
            return refused.status, str(refused)
        except TimeoutError:
            return 408, f"the request was not complete within {READ_SECONDS:.0f} s"
        return 204, ""

    async def _head(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, Reports, int]:
        """Path, attempt and length of the body. Raises RefusedError."""
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.LimitOverrunError:
            raise RefusedError(413, f"the headers are larger than {MAX_HEAD_BYTES} bytes") from None
        method, _, rest = lines[0].partition(" ")
        path = rest.partition(" ")[0].partition("?")[0].rstrip("/")
        headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
        if path not in ROUTES:
            raise RefusedError(404, f"no route {path or '/'}; POST to {', '.join(ROUTES)}")
        if method != "POST":
            raise RefusedError(405, f"{path} takes POST, not {method}")
        reports = self._attempt(headers)
        length = body_length(headers)
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return path, reports, length

    def _attempt(self, headers: Mapping[str, str]) -> Reports:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise RefusedError(401, "send the header 'Authorization: Bearer' with the value of LIGHTNING_REPORT_TOKEN")
        reports = self._attempts.get(token.strip())
        if reports is None:
            raise RefusedError(401, "the token is no running attempt's: it is wrong, or the attempt has ended")
        return reports


def body_length(headers: Mapping[str, str]) -> int:
    """Bytes of the body. Raises RefusedError."""
    given = headers.get("content-length", "")
    if not given.isdecimal():
        raise RefusedError(411, "send the JSON in one piece, with a Content-Length header")
    if int(given) > MAX_BODY_BYTES:
        raise RefusedError(413, f"the body has {given} bytes; {MAX_BODY_BYTES} are allowed")
    return int(given)


def record(reports: Reports, path: str, raw: bytes) -> None:
    """Record one report in its attempt. Raises RefusedError."""
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError(400, f"the body must be a JSON object, got {raw[:80].decode(errors='replace')!r}")
    try:
        reports.context.run(ROUTES[path], reports, body)
    except (TypeError, ValueError, AgentError) as error:
        raise RefusedError(400, str(error)) from None
    except RuntimeError as error:
        raise RefusedError(400, f"the attempt records nothing: {error}") from None


async def discard(reader: asyncio.StreamReader) -> None:
    """Read to the end."""
    while await reader.read(65536):
        pass


report_servers = PerLoop(ReportServer)
