"""The side of the upstream: a request with the relay's own key, sent again where that helps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from lightning_ray.relay.call import RelayedCall
from lightning_ray.relay.limits import Limiter
from lightning_ray.relay.redaction import Redaction
from lightning_ray.relay.retrying import may_pass, pause
from lightning_ray.relay.settings import Upstream
from lightning_ray.relay.spend import Spend

CONNECT_SECONDS = 15.0
SENT_ON = (b"accept", b"content-type", b"anthropic-version", b"anthropic-beta", b"openai-beta")
"""Headers of a client that the upstream gets: nothing that says who it is, or opens anything."""
SENT_BACK = ("content-type", "retry-after", "retry-after-ms", "x-should-retry", "request-id", "x-request-id")
SENT_BACK_FAMILIES = ("x-ratelimit-", "anthropic-ratelimit-")
"""Headers of the upstream that a client gets."""
KEY_REFUSED = (401, 403, 407)
"""Answers about the relay's own key, whose words may quote some of it."""

Headers = list[tuple[bytes, bytes]]


class Refused(Exception):
    """The relay answers itself, with an error."""

    def __init__(self, status: int, reason: str, headers: Headers | None = None):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers or []


class Asking:
    """Sends calls to one upstream."""

    def __init__(self, name: str, upstream: Upstream, limiter: Limiter, spend: Spend):
        self.redaction = Redaction(upstream.secrets())
        self._name = name
        self._upstream = upstream
        self._limiter = limiter
        self._spend = spend
        own = {"accept-encoding": "identity", **upstream.own_headers()}
        self._own_headers = [(name.encode(), value.encode()) for name, value in own.items()]
        silence = httpx.Timeout(upstream.timeout_seconds, connect=CONNECT_SECONDS, pool=None)
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=30)
        self._http = httpx.AsyncClient(timeout=silence, limits=unlimited)

    @asynccontextmanager
    async def answer(self, call: RelayedCall) -> AsyncIterator[httpx.Response]:
        """The upstream's answer, unread; its connection is closed at the end, whatever is left of it.

        Raises Refused if there is none, or none for a client's eyes.
        """
        response = await self._tried(call)
        try:
            call.status = response.status_code
            if response.status_code in KEY_REFUSED:
                raise Refused(502, f"upstream {self._name!r} refused the relay's own key ({response.status_code})")
            if 300 <= response.status_code < 400:
                raise Refused(502, f"upstream {self._name!r} is elsewhere ({response.status_code}): set its base_url")
            yield response
        finally:
            await response.aclose()

    def headers_back(self, response: httpx.Response) -> Headers:
        """What a client gets of the headers."""
        return [
            (name.encode(), self.redaction.clean(value.encode("latin-1", "replace")))
            for name, value in response.headers.items()
            if name in SENT_BACK or name.startswith(SENT_BACK_FAMILIES)
        ]

    def broken(self, error: httpx.HTTPError) -> Refused:
        """An answer that broke off."""
        return Refused(502, f"upstream {self._name!r} broke off its answer: {type(error).__name__}")

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def _tried(self, call: RelayedCall) -> httpx.Response:
        """Send until there is an answer that another try would not change, or no try is left."""
        deadline = time.monotonic() + self._upstream.retry_seconds
        while True:
            response, failure = await self._send(call)
            if response is not None and not may_pass(response.status_code, response.headers):
                return response
            wait = pause(call.retries, {} if response is None else response.headers)
            if call.retries >= self._upstream.retries or time.monotonic() + wait > deadline:
                if response is None:
                    raise Refused(502, f"upstream {self._name!r} cannot be reached: {failure}")
                return response
            if response is not None:
                await response.aclose()
            call.retries += 1
            self._spend.retries += 1
            await asyncio.sleep(wait)

    async def _send(self, call: RelayedCall) -> tuple[httpx.Response | None, str]:
        """The head of the answer; without one, why the connection failed."""
        await self._limiter.request()
        url = httpx.URL(self._upstream.url(call.path))
        if call.query:
            url = url.copy_with(query=call.query)
        own = {name for name, _ in self._own_headers}
        headers = [(name, value) for name, value in call.headers if name in SENT_ON and name not in own]
        request = self._http.build_request(
            call.method, url, content=call.body or None, headers=[*headers, *self._own_headers]
        )
        try:
            return await self._http.send(request, stream=True), ""
        except httpx.ReadTimeout:
            silence = f"upstream {self._name!r} was silent for {self._upstream.timeout_seconds:g} s"
            raise Refused(504, silence) from None  # it may be at work still: another try would cost once more
        except httpx.TransportError as error:
            return None, self.redaction.clean_text(f"{type(error).__name__}: {error}")
