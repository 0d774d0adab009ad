"""The side of the upstream: a request with the relay's own key, sent again where that helps.

By aiohttp, whose pool of connections does not get slower with their number, as httpx's does.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from lightning_ray.relay.call import RelayedCall
from lightning_ray.relay.limits import Limiter
from lightning_ray.relay.redaction import Redaction
from lightning_ray.relay.retrying import may_pass, pause
from lightning_ray.relay.settings import Upstream
from lightning_ray.relay.spend import Spend

CONNECT_SECONDS = 15.0
KEEP_SECONDS = 30.0
"""For which a connection is kept for the next call."""
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
        self._own_headers = {"accept-encoding": "identity", **upstream.own_headers()}
        self._proxy = proxy_for(upstream.base_url)
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def answer(self, call: RelayedCall) -> AsyncIterator[aiohttp.ClientResponse]:
        """The upstream's answer, unread; its connection is closed at the end, whatever is left of it.

        Raises Refused if there is none, or none for a client's eyes.
        """
        response = await self._tried(call)
        try:
            call.status = response.status
            if response.status in KEY_REFUSED:
                raise Refused(502, f"upstream {self._name!r} refused the relay's own key ({response.status})")
            if 300 <= response.status < 400:
                raise Refused(502, f"upstream {self._name!r} is elsewhere ({response.status}): set its base_url")
            yield response
        finally:
            response.release()  # which closes a connection that has not come to the answer's end

    def headers_back(self, response: aiohttp.ClientResponse) -> Headers:
        """What a client gets of the headers."""
        return [
            (name.lower().encode(), self.redaction.clean(value.encode("latin-1", "replace")))
            for name, value in response.headers.items()
            if name.lower() in SENT_BACK or name.lower().startswith(SENT_BACK_FAMILIES)
        ]

    def broken(self, error: aiohttp.ClientError) -> Refused:
        """An answer that broke off."""
        return Refused(502, f"upstream {self._name!r} broke off its answer: {type(error).__name__}")

    async def close(self) -> None:
        """Give the connections back."""
        if self._session is not None:
            await self._session.close()

    async def _tried(self, call: RelayedCall) -> aiohttp.ClientResponse:
        """Send until there is an answer that another try would not change, or no try is left."""
        deadline = time.monotonic() + self._upstream.retry_seconds
        while True:
            response, failure = await self._send(call)
            if response is not None and not may_pass(response.status, response.headers):
                return response
            wait = pause(call.retries, {} if response is None else response.headers)
            if call.retries >= self._upstream.retries or time.monotonic() + wait > deadline:
                if response is None:
                    raise Refused(502, f"upstream {self._name!r} cannot be reached: {failure}")
                return response
            if response is not None:
                response.release()
            call.retries += 1
            self._spend.retries += 1
            await asyncio.sleep(wait)

    async def _send(self, call: RelayedCall) -> tuple[aiohttp.ClientResponse | None, str]:
        """The head of the answer; without one, why the connection failed."""
        await self._limiter.request()
        if self._session is None:
            self._session = self._connect()
        query = f"?{call.query.decode('latin-1')}" if call.query else ""
        url = URL(self._upstream.url(call.path) + query, encoded=True)
        given = {name.decode(): value.decode("latin-1") for name, value in call.headers if name in SENT_ON}
        asked = self._session.request(
            call.method,
            url,
            data=call.body or None,
            headers=given | self._own_headers,
            allow_redirects=False,
            proxy=self._proxy,
        )
        try:
            return await asked, ""
        except aiohttp.ServerTimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                return None, "no connection in time"
            # It may be at work still: another try would cost once more.
            silence = f"upstream {self._name!r} was silent for {self._upstream.timeout_seconds:g} s"
            raise Refused(504, silence) from None
        except aiohttp.ClientError as error:
            return None, self.redaction.clean_text(f"{type(error).__name__}: {error}")

    def _connect(self) -> aiohttp.ClientSession:
        silence = aiohttp.ClientTimeout(
            total=None, connect=None, sock_connect=CONNECT_SECONDS, sock_read=self._upstream.timeout_seconds
        )
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS)
        return aiohttp.ClientSession(connector=connector, timeout=silence, cookie_jar=aiohttp.DummyCookieJar())


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address (HTTPS_PROXY and the like)."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)
