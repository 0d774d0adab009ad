"""The edge: the ASGI layer in front of the engine's own app that knows who is calling.

A request is opened by its attempt's key alone, read whole, and handed to the app as it was sent; the answer of a
captured route goes out through ``Answer``. Routes that sample nothing are passed; all others are closed, so that
nothing is sampled that is not captured. What the tokens were is the engine half's business.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from lightning_ray.capture.address import Address, Caller, identify, key_of
from lightning_ray.capture.answer import ON_ITS_WAY, Answer, Append, Message, Send
from lightning_ray.capture.append import SharedAppend
from lightning_ray.capture.audience import POLICY
from lightning_ray.capture.call import CapturedRequest, current_request
from lightning_ray.capture.dialects import DIALECTS, Dialect
from lightning_ray.capture.images import MARK, Image, by_reference
from lightning_ray.capture.keys import KeyRefused, open_operator_key
from lightning_ray.capture.refusal import refuse, respond
from lightning_ray.capture.retries import SentCall, SentCalls, digest_of, retry_of
from lightning_ray.semconv import IMAGE_SPAN
from lightning_ray.traces.ids import parent_in

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

PASSED = ("/v1/models", "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize")
"""Routes that sample nothing."""
IMAGES_KNOWN = 10_000
RETRY_AFTER = ((b"retry-after", b"1"),)
BODY_SECONDS = 60.0
"""For the next piece of a request's body."""


@dataclass(frozen=True)
class Limits:
    """What one request, and one attempt at once, may ask for."""

    body_bytes: int = 32 * 2**20
    calls_per_attempt: int = 256


@dataclass(frozen=True)
class Backend:
    """What the edge needs of what it stands in front of."""

    ready: Callable[[], Awaitable[str | None]]
    """Waits until it may serve; gives the reason if it does not become ready in time."""
    version: Callable[[], int | None]
    """The weight version that serves now; None where there are none."""
    status: Callable[[], Awaitable[dict[str, Any]]]
    """What ``GET /status`` answers to holders of the operator's key."""
    audience: str = POLICY
    """Whose keys open it."""
    model: str | None = None
    """Its name, if all that it serves is one model."""


class CaptureEdge:
    """Wraps ``app``; ``append`` stores rows of the span schema and returns when they are durable."""

    def __init__(self, app: ASGIApp, secret: bytes, append: Append, backend: Backend, limits: Limits | None = None):
        self.app = app
        self.secret = secret
        self.append = SharedAppend(append, lambda: len(self._answers))
        self.backend = backend
        self.limits = limits or Limits()
        self._sent = SentCalls()
        self._at_once: Counter[tuple[str, str]] = Counter()
        self._answers: set[Answer] = set()
        """Of the calls at once, of all attempts."""
        self._images: OrderedDict[tuple[tuple[str, str], str], None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "use HTTP"})
            return
        given = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or given == "/health":
            await self.app(scope, receive, send)
        elif given == "/status":
            await self._status(scope, send)
        else:
            await self._route(Address.of(as_sent(scope, given)), scope, receive, send)

    def held_up(self) -> float:
        """Seconds that the app has had a call which has neither come to the engine nor been answered; the longest."""
        return max((answer.seconds for answer in self._answers if answer.stage == ON_ITS_WAY), default=0.0)

    def calls(self) -> dict[str, Any]:
        """How many calls are at work, and how far the oldest has come."""
        oldest = max(self._answers, key=lambda answer: answer.seconds, default=None)
        return {"calls": len(self._answers), "oldest_call": oldest and oldest.progress}

    async def _status(self, scope: Scope, send: Send) -> None:
        try:
            open_operator_key(self.secret, key_of(scope["headers"]))
        except KeyRefused as refused:
            await refuse(send, None, 401, str(refused))
            return
        await respond(send, 200, await self.backend.status())

    async def _route(self, address: Address, scope: Scope, receive: Receive, send: Send) -> None:
        dialect = DIALECTS.get(address.path)
        if dialect is None and address.path not in PASSED:
            known = ", ".join((*DIALECTS, *PASSED))
            await refuse(send, None, 404, f"{address.path} is not captured; use one of {known}")
            return
        try:
            caller = identify(self.secret, address, scope["headers"], self.backend.audience)
        except KeyRefused as refused:
            await refuse(send, dialect, 401, str(refused))
            return
        try:
            raw = await read_body(receive, self.limits.body_bytes)
        except HungUp:
            return
        except BodyRefused as refused:
            await refuse(send, dialect, refused.status, str(refused))
            return
        inner = {**scope, "path": address.path, "raw_path": address.path.encode(), "root_path": ""}
        if dialect is not None:
            await self._captured(dialect, caller, inner, raw, receive, send)
        elif (reason := await self.backend.ready()) is not None:
            await refuse(send, None, 503, reason)
        else:
            await self.app(inner, replay(raw, receive), send)

    async def _captured(
        self, dialect: Dialect, caller: Caller, scope: Scope, raw: bytes, receive: Receive, send: Send
    ) -> None:
        parsed = parse(raw)
        refusal = parsed if isinstance(parsed, str) else dialect.refusal(parsed[0])
        if refusal is not None:
            await refuse(send, dialect, 400, refusal)
            return
        assert not isinstance(parsed, str)
        body, images = parsed
        request = CapturedRequest(caller, dialect.api, body, self.backend.model)
        request.continues = dialect.continues(body)
        request.parent = parent_in(scope["headers"], request.trace_id)
        request.digest, request.retry = digest_of(dialect.path, raw), retry_of(scope["headers"])
        sent, superseded = self._sent.begin(request.attempt, request.digest, request.retry)
        if (not_now := await self._not_now(caller)) is not None:
            sent.span_ids, sent.delivered = superseded, False  # for the next retry to tell
            await refuse(send, dialect, *not_now)
            return
        sent.span_ids, request.place = request.span_ids, sent.place
        answer = Answer(request, dialect, self.append, send, self.backend.version)
        answer.add(self._image_rows(request, images) + request.superseding(superseded))
        self._at_once[request.attempt] += 1
        self._answers.add(answer)
        try:
            await self._answer(request, sent, answer, scope, replay(raw, receive, answer.hung_up))
        finally:
            self._answers.discard(answer)
            self._at_once[request.attempt] -= 1
            if not self._at_once[request.attempt]:
                del self._at_once[request.attempt]
            if answer.unstored:
                for image in images:
                    self._images.pop((request.attempt, image.sha256), None)

    async def _not_now(self, caller: Caller) -> tuple[int, str, Sequence[tuple[bytes, bytes]]] | None:
        """Why a call cannot be answered at present: status, reason and headers."""
        if (reason := await self.backend.ready()) is not None:
            return 503, reason, ()
        most = self.limits.calls_per_attempt
        if self._at_once[caller.rollout_id, caller.attempt_id] >= most:
            return 429, f"attempt {caller.attempt_id} has {most} calls at once already; wait", RETRY_AFTER
        return None

    async def _answer(
        self, request: CapturedRequest, sent: SentCall, answer: Answer, scope: Scope, receive: Receive
    ) -> None:
        token = current_request.set(request)
        try:
            await self.app(scope, receive, answer.release)
        finally:
            current_request.reset(token)
            sent.delivered = answer.delivered and not answer.failed
            await answer.end()
            if untold := sent.untold():
                await self.append(request.superseding(untold))

    def _image_rows(self, request: CapturedRequest, images: list[Image]) -> list[dict[str, Any]]:
        """Spans of the images that this attempt has not sent before."""
        rows = []
        for image in images:
            key = (request.attempt, image.sha256)
            if key not in self._images:
                self._images[key] = None
                attributes = {"sha256": image.sha256, "media_type": image.media_type, "data": image.data}
                rows.append({**request.row(IMAGE_SPAN, request.started), "status": "OK", "attributes": attributes})
        while len(self._images) > IMAGES_KNOWN:
            self._images.popitem(last=False)
        return rows


class HungUp(Exception):
    """The client hung up amid its request."""


class BodyRefused(Exception):
    """A request body that is not read to its end."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def parse(raw: bytes) -> tuple[dict[str, Any], list[Image]] | str:
    """The body and the images that it refers to, or what is wrong with it."""
    try:
        body = json.loads(raw)
        if isinstance(body, dict):
            return by_reference(body) if MARK in raw else (body, [])
    except ValueError as error:
        return f"the request body is not JSON: {error}"
    except RecursionError:
        return "the request body is nested too deeply"
    return f"the request body must be a JSON object, not {type(body).__name__}"


def as_sent(scope: Scope, path: str) -> str:
    """The request's path with its percent-encoding; ``path`` is without."""
    raw = scope.get("raw_path", b"").decode("latin-1").removeprefix(scope.get("root_path", ""))
    return raw if unquote(raw) == path else quote(path)


async def read_body(receive: Receive, most: int) -> bytes:
    """The whole request body. Raises HungUp; BodyRefused if it is larger than ``most`` bytes or stays away."""
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                message = await receive()
        except TimeoutError:
            raise BodyRefused(408, f"nothing more of the request body came for {BODY_SECONDS:g} s") from None
        if message["type"] == "http.disconnect":
            raise HungUp
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise BodyRefused(413, f"the request body is larger than {most} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive, hung_up: Callable[[], None] = lambda: None) -> Receive:
    """A receive that gives the body once and then what the server has to say; a disconnect is told to ``hung_up``."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            try:
                message = await receive()
            except Exception:  # Serve's proxy, which the client was behind, is gone
                hung_up()
                raise
            if message["type"] == "http.disconnect":
                hung_up()
            return message
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
