"""Passes requests on to one upstream, and its answers back as they come.

Streams go out event by event, each when it has come, with the bytes that the upstream sent; the event that ends an
answer goes out when the call is captured. A request is sent again only before anything of an answer has come. When
the client hangs up the upstream's call is cancelled.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from aiohttp import ClientError, ClientResponse

from lightning_ray.capture.call import CapturedRequest, current_request
from lightning_ray.capture.dialects import openai_error
from lightning_ray.capture.edge import Receive, Scope, Send
from lightning_ray.capture.refusal import refuse
from lightning_ray.relay.asking import Asking, Headers, Refused
from lightning_ray.relay.call import RelayedCall
from lightning_ray.relay.limits import Limiter, TooBusy
from lightning_ray.relay.reading import Event, Events
from lightning_ray.relay.settings import Upstream
from lightning_ray.relay.spend import Spend

KEY = "relay"
"""Under which a captured request knows its relayed call."""
RETRY_AFTER = [(b"retry-after", b"5")]


class Forwarder:
    """The ASGI app behind the edge of one upstream."""

    def __init__(self, name: str, upstream: Upstream):
        self.name = name
        self.upstream = upstream
        self.spend = Spend()
        self.limiter = Limiter(upstream)
        self._asking = Asking(name, upstream, self.limiter, self.spend)
        self._clean = self._asking.redaction.clean
        self.close = self._asking.close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]  # the edge has it whole
        call, request = RelayedCall(self.name, self.upstream, scope, body), current_request.get()

        def settle() -> None:
            self._settle(call, request)

        if request is not None:
            request.running[KEY] = settle
        answering = asyncio.ensure_future(self._answer(call, send, settle))
        hanging_up = asyncio.ensure_future(hung_up(receive))
        try:
            await asyncio.wait({answering, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            hanging_up.cancel()
            answering.cancel()
            await asyncio.gather(answering, hanging_up, return_exceptions=True)
            if request is None:  # otherwise the edge settles it, and notes that the client hung up
                settle()

    def status(self) -> dict[str, Any]:
        """How busy it is, and the sums of its calls."""
        at_work = {"running": self.limiter.running, "waiting": self.limiter.waiting}
        return {**at_work, **self.spend.as_dict(), "max_spend": self.upstream.max_spend}

    def _settle(self, call: RelayedCall, request: CapturedRequest | None) -> None:
        """The call has ended, one way or another: it is counted and captured, once."""
        if call.settled:
            return
        call.settled = True
        self.spend.add(call.reading.usage, call.cost, call.failed is not None, call.answered)
        if request is not None:
            request.running.pop(KEY, None)
            call.capture(request)
            request.engine_ended()

    async def _answer(self, call: RelayedCall, send: Send, settle: Callable[[], None]) -> None:
        try:
            await self._forward(call, send, settle)
        except Refused as refused:
            await self._refuse(call, send, settle, refused)
        except TooBusy:
            waited = f"{self.upstream.wait_seconds:g} s"
            reason = f"upstream {self.name!r} had no place within its limits for {waited}; ask less of it"
            await self._refuse(call, send, settle, Refused(429, reason, RETRY_AFTER))

    async def _forward(self, call: RelayedCall, send: Send, settle: Callable[[], None]) -> None:
        self._refuse_overspending()
        async with self.limiter.slot(call.expected_tokens, lambda: call.tokens):
            self._refuse_overspending()
            call.sent = time.time()
            async with self._asking.answer(call) as response:
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    await self._stream(call, response, send, settle)
                else:
                    await self._whole(call, response, send, settle)

    async def _refuse(self, call: RelayedCall, send: Send, settle: Callable[[], None], refused: Refused) -> None:
        call.failure = refused.reason
        settle()
        await refuse(send, call.dialect, refused.status, refused.reason, refused.headers)

    def _refuse_overspending(self) -> None:
        most, spent = self.upstream.max_spend, self.spend.money
        if most is not None and spent >= most:
            raise Refused(402, f"upstream {self.name!r} has cost {spent:.4f}, and may cost {most:g} (max_spend)")

    async def _whole(self, call: RelayedCall, response: ClientResponse, send: Send, settle: Callable[[], None]) -> None:
        """An answer that is of use only as a whole."""
        try:
            raw = self._clean(await response.read())
        except ClientError as error:
            raise self._asking.broken(error) from None
        call.first_byte = time.time()
        call.reading.whole(raw, response.status)
        settle()
        length = (b"content-length", str(len(raw)).encode())
        await send(start(response, [*self._asking.headers_back(response), length]))
        await send({"type": "http.response.body", "body": raw})

    async def _stream(
        self, call: RelayedCall, response: ClientResponse, send: Send, settle: Callable[[], None]
    ) -> None:
        await send(start(response, self._asking.headers_back(response)))
        events, broken = Events(self._clean), None
        try:
            async for raw in response.content.iter_any():
                call.first_byte = call.first_byte or time.time()
                await pass_on(call, events.feed(raw), send, settle)
        except ClientError as error:
            broken = self._asking.broken(error)
        rest = self._clean(events.rest)
        if broken is not None and not call.reading.is_whole:
            call.failure = broken.reason
            rest = error_event(call, broken)
        settle()
        await send({"type": "http.response.body", "body": rest})


async def pass_on(call: RelayedCall, events: list[Event], send: Send, settle: Callable[[], None]) -> None:
    """Send the events that have come, at once; before one that ends the answer the call is captured."""
    ready = b""
    for event in events:
        call.reading.add(event)
        if event.is_last:
            if ready:
                await send(more(ready))
            ready = b""
            settle()
        if not (call.hide_usage and event.is_only_usage):
            ready += event.raw
    if ready:
        await send(more(ready))


def error_event(call: RelayedCall, broken: Refused) -> bytes:
    """What tells a client that its stream is not whole."""
    error = openai_error if call.dialect is None else call.dialect.error
    return f"event: error\ndata: {json.dumps(error(broken.status, broken.reason))}\n\n".encode()


def start(response: ClientResponse, headers: Headers) -> dict[str, Any]:
    """The head of an answer."""
    return {"type": "http.response.start", "status": response.status, "headers": headers}


def more(body: bytes) -> dict[str, Any]:
    """A part of an answer."""
    return {"type": "http.response.body", "body": body, "more_body": True}


async def hung_up(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
