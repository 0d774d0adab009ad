"""Answers that the edge gives itself: errors, in the shape that the caller's client reads."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from lightning_ray.capture.dialects import Dialect, openai_error

Headers = Sequence[tuple[bytes, bytes]]


async def refuse(
    send: Callable[[Any], Awaitable[None]], dialect: Dialect | None, status: int, reason: str, headers: Headers = ()
) -> None:
    """Answer with an error; without a dialect, in OpenAI's shape."""
    body = openai_error(status, reason) if dialect is None else dialect.error(status, reason)
    await respond(send, status, body, headers)


async def respond(send: Callable[[Any], Awaitable[None]], status: int, body: Any, headers: Headers = ()) -> None:
    """Answer with JSON."""
    raw = json.dumps(body).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": raw})
