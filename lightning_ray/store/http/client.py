"""The client of the store's HTTP API: the store's calls from any process, without Ray.

Every call may be resent: the ids are chosen before the first sending. Invariant: a call ends in its answer, a
StoreError (refused, do not resend) or, when its deadline has passed, an InfrastructureError. Which request a call
is, is ``calls``' matter.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import pyarrow as pa

from lightning_ray.errors import ConfigError, InfrastructureError, StoreError
from lightning_ray.store.base import Store
from lightning_ray.store.http.calls import Ask, ask
from lightning_ray.store.http.media import ARROW, MSGPACK
from lightning_ray.store.schema import decode_batch, encode_batch

TOKEN_VARIABLE = "LIGHTNING_RAY_STORE_TOKEN"
"""Of the environment, for who serves a store and for who asks it."""
_URL = re.compile(r"^https?://[^/\s]+")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_CONNECT_SECONDS = 5.0
_ASKED_WAIT_SECONDS = 30.0
"""How long one request asks to wait inside the store; longer waits are several requests."""
_APPEND_BYTES = 16 * 2**20
"""Larger batches of spans travel in several requests."""
_COME_AGAIN = frozenset({429, 502, 503, 504})


class HttpStoreClient(Store):
    """A store behind ``deployments/store_api.py`` or ``store.http.server``. Can be pickled; the token goes along.

    ``address`` is the API's root, such as ``http://host:8000``; ``deadline`` how many seconds a call may go
    without an answer, beyond the time it asked to wait. Raises ConfigError for an address that cannot be one.
    """

    def __init__(self, address: str, token: str, deadline: float = 120.0) -> None:
        if not _URL.match(address):
            raise ConfigError(f"the store's address is {address!r}; it must be like http://host:8000")
        self._address = address.rstrip("/")
        self._token = token
        self._deadline = deadline
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._address, self._token, self._deadline)

    def __repr__(self) -> str:
        return f"HttpStoreClient({self._address!r})"

    @property
    def capabilities(self) -> dict[str, bool]:
        """As ``Store``; usable from several event loops, and OpenTelemetry exporters can post to it."""
        return {**super().capabilities, "thread_safe": True, "otlp_traces": True}

    def otlp_traces_endpoint(self) -> str:
        """The URL to which OpenTelemetry exporters post traces, with the token in ``Authorization``."""
        return f"{self._address}/v1/traces"

    async def close(self) -> None:
        """Close this event loop's connections."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        if name == "append_spans" and args[0].size > _APPEND_BYTES:
            return await self._append_in_parts(decode_batch(args[0]))
        request = ask(name, *args)
        if not request.waits:
            return await self._answer(name, request, None)
        end = time.monotonic() + (timeout or 0.0)
        while True:
            wait = min(max(0.0, end - time.monotonic()), _ASKED_WAIT_SECONDS)
            until = time.monotonic() + wait
            answer = await self._answer(name, request, wait)
            # An answer before its time is final: there is something, or the worker was released.
            if time.monotonic() >= end or time.monotonic() < until or _complete(name, args, answer):
                return answer

    async def _append_in_parts(self, batch: pa.RecordBatch) -> list[int]:
        """Both halves of a batch, also when one is refused in part."""
        if batch.num_rows < 2:
            raise StoreError(f"a span has {batch.nbytes} bytes; the HTTP API takes {_APPEND_BYTES} at once")
        middle, left_out, refusals = batch.num_rows // 2, [], []
        for first, half in ((0, batch.slice(0, middle)), (middle, batch.slice(middle))):
            try:
                left_out += [first + row for row in await self._call("append_spans", encode_batch(half))]
            except StoreError as refusal:
                refusals.append(str(refusal))
        if refusals:
            raise StoreError("; ".join(refusals))
        return left_out

    async def _answer(self, name: str, request: Ask, wait: float | None) -> Any:
        content, kind = request.content(name, wait)
        headers = {"Content-Type": kind, "Accept": f"{MSGPACK}, {ARROW}", "Authorization": f"Bearer {self._token}"}
        end = time.monotonic() + self._deadline + (wait or 0.0)
        pause, cause = _FIRST_PAUSE, "no answer"
        while (left := end - time.monotonic()) > 0:
            try:
                response = await self._client().request(
                    request.method,
                    f"{self._address}/v1/agl/{request.path}",
                    content=content,
                    headers=headers,
                    timeout=httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS)),
                )
            except httpx.TransportError as error:
                cause = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return request.read(response.content)
                cause = _detail(response)
                if response.status_code < 500 and response.status_code not in _COME_AGAIN:
                    raise StoreError(cause)
                if response.status_code not in _COME_AGAIN:
                    break
            await asyncio.sleep(min(pause * random.uniform(0.5, 1.0), max(0.0, end - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise InfrastructureError(
            f"the span store at {self._address} cannot answer {name} (deadline {self._deadline} s): {cause}"
        )

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            client = self._clients[loop] = httpx.AsyncClient(limits=limits)
        return client


def _complete(name: str, args: tuple[Any, ...], answer: list[Any]) -> bool:
    """Whether a wait has found all that it waited for."""
    return len(answer) >= len(set(args[0])) if name == "wait_for_rollouts" else bool(answer)


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"
