"""A client of the edge, in front of a small ASGI app that samples as the engine half does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from lightning_ray.capture.call import SampledSequence, current_request
from lightning_ray.capture.edge import Backend, CaptureEdge, Limits
from lightning_ray.capture.keys import Claims, issue_key, operator_key
from lightning_ray.store.schema import spans_to_batch

SECRET = b"s" * 32
CHAT = "/v1/chat/completions"
TOKENIZE = "/tokenize"
VERSION = 9


@asynccontextmanager
async def sampling(prompt: list[int], sampled: list[int]) -> AsyncIterator[None]:
    """One call of the engine, as the engine half tells it to the edge."""
    request = current_request.get()
    assert request is not None
    name = str(len(request.sequences))
    ended = False

    def take_over() -> None:
        if request.running.pop(name, None) is not None:
            count = len(sampled)
            finish = "stop" if ended else None
            request.sequences.append(SampledSequence(prompt, list(sampled), [-0.5] * count, [3] * count, finish))
            request.engine_ended()

    request.at_engine, request.running[name] = True, take_over
    try:
        yield
        ended = True
    finally:
        take_over()


async def respond(send: Any, body: bytes, more: bool = False, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": more})


class App:
    """Answers a chat with the body it got; the prompt is the body's ``ids``."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http" or scope["path"] in ("/health", "/v1/models"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"open"})
            return
        message = await receive()
        self.bodies.append(message["body"])
        if scope["path"] == TOKENIZE:
            await respond(send, b"open")
            return
        body = json.loads(message["body"])
        ids = body.get("ids", [1])
        if not body.get("stream"):
            async with sampling(ids, [7, 8]):
                await asyncio.sleep(body.get("delay", 0))
            await asyncio.sleep(body.get("building", 0))
            await respond(send, json.dumps({"ids": ids}).encode(), status=body.get("status", 200))
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sampled: list[int] = []
        async with sampling(ids, sampled):
            for token in (7, 8):
                sampled.append(token)
                await send({"type": "http.response.body", "body": f"{token} ".encode(), "more_body": True})
                await asyncio.sleep(body.get("delay", 0))
        await send({"type": "http.response.body", "body": b"[DONE]", "more_body": False})


class Client:
    """Calls the edge and keeps what it got, and in which order with the appends."""

    def __init__(self, app: Any = None, limits: Limits | None = None) -> None:
        self.app = app or App()
        self.headers: dict[str, str] = {}
        self.events: list[Any] = []
        self.rows: list[dict[str, Any]] = []
        self.not_ready: str | None = None
        self.failure: Exception | None = None
        backend = Backend(self.ready, lambda: VERSION, self.status)
        self.edge = CaptureEdge(self.app, SECRET, self.append, backend, limits)

    async def append(self, rows: list[dict[str, Any]]) -> None:
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        spans_to_batch(rows)
        self.rows += rows
        self.events.append("stored")

    async def ready(self) -> str | None:
        return self.not_ready

    async def status(self) -> dict[str, Any]:
        return {"version": VERSION}

    async def call(
        self,
        path: str = f"/rollout/ro-1/attempt/at-1{CHAT}",
        body: bytes | dict[str, Any] = b'{"ids": [1, 2]}',
        headers: list[tuple[bytes, bytes]] | None = None,
        chunk: int | None = None,
        send: Callable[[Any], Any] | None = None,
        hang_up: asyncio.Event | None = None,
        raw_path: bytes | None = None,
        whole: bool = True,
    ) -> tuple[int, bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        size = chunk or max(1, len(raw))
        parts = [raw[at : at + size] for at in range(0, len(raw), size)] or [b""]
        status, answer = 0, b""

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts) or not whole}
            await (hang_up or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def collect(message: Any) -> None:
            nonlocal status, answer
            if send is not None:
                await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer += message.get("body", b"")
                self.events.append(message.get("body", b""))

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": raw_path or path.encode(),
            "root_path": "",
            "query_string": b"beta=true",
            "headers": bearer("ro-1", "at-1") if headers is None else headers,
        }
        await self.edge(scope, receive, collect)
        return status, answer


def bearer(
    rollout_id: str, attempt_id: str, expires: float | None = None, **sampling: Any
) -> list[tuple[bytes, bytes]]:
    claims = Claims(rollout_id, attempt_id, expires or time.time() + 60, sampling)
    return [(b"authorization", b"Bearer " + issue_key(SECRET, claims).encode())]


def operator() -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + operator_key(SECRET, 3600).encode())]
