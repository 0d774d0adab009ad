"""The edge: the ASGI layer in front of the engine's own app that knows who is calling.

``/rollout/{rollout_id}/attempt/{attempt_id}/v1/...`` is opened by that attempt's key alone and reaches the app as
``/v1/...``. Invariant: a client that was answered in full finds its call in the span store, because the rows are
appended (durably) before the first byte that follows the end of sampling is released. What the tokens were is the
engine half's business.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lightning_ray.capture.call import CapturedRequest, current_request
from lightning_ray.capture.keys import KeyRefused, open_key
from lightning_ray.errors import StoreError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Append = Callable[[list[dict[str, Any]]], Awaitable[None]]

ROUTE = re.compile(r"^/rollout/([^/]+)/attempt/([^/]+)(/v1/.*)$")
APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
"""Captured routes."""
PASSED = ("/v1/models", "/v1/messages/count_tokens")
"""Routes that sample nothing. All others are closed, so that nothing is sampled that is not captured."""
MAX_BODY_BYTES = 32 * 2**20

logger = logging.getLogger(__name__)


class CaptureEdge:
    """Wraps ``app``; ``append`` stores rows of the span schema and returns when they are durable."""

    def __init__(self, app: ASGIApp, secret: bytes, append: Append, ready: Callable[[], Awaitable[str | None]]):
        self.app = app
        self.secret = secret
        self.append = append
        self.ready = ready
        """Waits until the replica may serve; gives the reason if it does not become ready in time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "use HTTP"})
            return
        given = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or given == "/health":
            await self.app(scope, receive, send)
            return
        route = ROUTE.match(given)
        if route is None:
            await refuse(send, 404, f"no route {given}; use /rollout/ID/attempt/ID/v1/...")
            return
        rollout_id, attempt_id, path = route.groups()
        api = APIS.get(path)
        if api is None and path not in PASSED:
            await refuse(send, 404, f"{path} is not captured; use one of {', '.join((*APIS, *PASSED))}")
            return
        try:
            claims = open_key(self.secret, bearer(scope))
            if (claims.rollout_id, claims.attempt_id) != (rollout_id, attempt_id):
                raise KeyRefused(f"the key belongs to attempt {claims.attempt_id}, not {attempt_id}")
        except KeyRefused as refused:
            await refuse(send, 401, str(refused))
            return
        if (reason := await self.ready()) is not None:
            await refuse(send, 503, reason)
            return
        inner = {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}
        if api is None:
            await self.app(inner, receive, send)
            return
        await self._captured(inner, receive, send, api, claims.sampling, rollout_id, attempt_id)

    async def _captured(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        api: str,
        sampling: dict[str, Any],
        rollout_id: str,
        attempt_id: str,
    ) -> None:
        raw = await read_body(receive)
        if raw is None:
            await refuse(send, 413, f"the request body is larger than {MAX_BODY_BYTES} bytes")
            return
        try:
            body = json.loads(raw)
        except ValueError as error:
            await refuse(send, 400, f"the request body is not JSON: {error}")
            return
        if not isinstance(body, dict):
            await refuse(send, 400, f"the request body must be a JSON object, not {type(body).__name__}")
            return
        request = CapturedRequest(rollout_id, attempt_id, api, body, sampling)
        answer = Answer(request, self.append, send)
        token = current_request.set(request)
        try:
            await self.app(scope, replay(raw, receive), answer.release)
        finally:
            current_request.reset(token)
            await answer.end()


class Answer:
    """Lets an answer go out, its call stored first; a call that cannot be stored is answered with an error."""

    def __init__(self, request: CapturedRequest, append: Append, send: Send):
        self._request = request
        self._append = append
        self._send = send
        self._rows: list[dict[str, Any]] = []
        """Rows that are not known to be durable; resending one stores it once, by its span id."""
        self._began = False
        self._refused = False

    async def release(self, message: Message) -> None:
        """Send a message of the app's."""
        if self._refused:
            return
        if self._request.complete:
            try:
                await self._store()
            except Exception as error:
                logger.exception("a call of attempt %s could not be stored", self._request.attempt_id)
                self._refused = True
                if self._began:
                    raise
                # 503 says that the infrastructure failed; the agent is not to blame for that.
                status = 400 if isinstance(error, StoreError) else 503
                await refuse(self._send, status, f"the call could not be stored: {error}")
                return
        self._began = True
        await self._send(message)

    async def end(self) -> None:
        """The app is done, or the client hung up: then what was sampled until now is stored."""
        self._request.settle()
        if not self._refused:
            await self._store()

    async def _store(self) -> None:
        self._rows += self._request.take_spans()
        if self._rows:
            await self._append(self._rows)
            self._rows = []


def bearer(scope: Scope) -> str:
    """The key a client sent, by ``Authorization: Bearer`` (OpenAI) or ``x-api-key`` (Anthropic)."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].decode("latin-1").strip()
        if name == b"x-api-key":
            return value.decode("latin-1").strip()
    raise KeyRefused("no key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")


async def read_body(receive: Receive) -> bytes | None:
    """The whole request body, or None if it is larger than MAX_BODY_BYTES."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once and then what the server has to say (a disconnect)."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with an error in OpenAI's shape."""
    body = json.dumps({"error": {"message": reason, "type": "lightning_ray", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
