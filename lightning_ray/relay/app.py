"""The relay's ASGI app: ``/to/{name}/...`` goes to the edge of that upstream, ``/status`` is the operator's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from lightning_ray.capture.address import key_of
from lightning_ray.capture.answer import Append
from lightning_ray.capture.audience import relayed
from lightning_ray.capture.edge import Backend, CaptureEdge, Receive, Scope, Send
from lightning_ray.capture.keys import KeyRefused, open_operator_key
from lightning_ray.capture.refusal import refuse, respond
from lightning_ray.relay.forward import Forwarder
from lightning_ray.relay.settings import Upstream, check_upstreams
from lightning_ray.relay.spend import Spend

_TO = re.compile(r"^/to/(?P<name>[^/]+)(?P<path>/.*)$")

Restore = Callable[[], Awaitable[Mapping[str, Spend]]]
"""What was spent before this process began, by upstream."""


class RelayApp:
    """Stands in front of several upstreams; ``append`` stores rows of spans and returns when they are durable.

    Raises ConfigError for a name that is none, and for a key that is not there.
    """

    def __init__(
        self, upstreams: Mapping[str, Upstream], secret: bytes, append: Append, restore: Restore | None = None
    ):
        check_upstreams(upstreams)
        self.forwarders = {name: Forwarder(name, upstream) for name, upstream in upstreams.items()}
        self._secret = secret
        self._restore = restore
        self._restoring: asyncio.Task[None] | None = None
        self._edges = {
            name: CaptureEdge(forwarder, secret, append, self._backend(name, forwarder))
            for name, forwarder in self.forwarders.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "use HTTP"})
            return
        given = scope["path"].removeprefix(scope.get("root_path", ""))
        to = _TO.match(given)
        if given == "/health":
            await respond(send, 200, {"status": "ok"})
        elif given == "/status":
            await self._answer_status(scope, send)
        elif to is None or to["name"] not in self._edges:
            known = ", ".join(f"/to/{name}" for name in self._edges)
            await refuse(send, None, 404, f"{given} is no route of the relay; there are {known}")
        else:
            raw = _TO.match(scope.get("raw_path", b"").decode("latin-1").removeprefix(scope.get("root_path", "")))
            below = {"path": to["path"], "raw_path": raw["path"].encode() if raw else b"", "root_path": ""}
            await self._edges[to["name"]]({**scope, **below}, receive, send)

    async def status(self) -> dict[str, Any]:
        """How busy each upstream is, and the sums of its calls."""
        await self._ready()
        return {name: forwarder.status() for name, forwarder in self.forwarders.items()}

    async def close(self) -> None:
        """Give all connections back."""
        for forwarder in self.forwarders.values():
            await forwarder.close()

    def _backend(self, name: str, forwarder: Forwarder) -> Backend:
        async def status() -> dict[str, Any]:
            await self._ready()
            return forwarder.status()

        return Backend(self._ready, lambda: None, status, relayed(name))

    async def _ready(self) -> str | None:
        """What was spent before is known first: it may be all that may be spent."""
        if self._restore is None:
            return None
        if self._restoring is None:
            self._restoring = asyncio.create_task(self._take_over(self._restore))
        try:
            await asyncio.shield(self._restoring)
        except Exception as error:
            self._restoring = None
            return f"what was spent before cannot be read: {error}; try again later"
        self._restore = None
        return None

    async def _take_over(self, restore: Restore) -> None:
        for name, before in (await restore()).items():
            if name in self.forwarders:
                self.forwarders[name].spend.include(before)

    async def _answer_status(self, scope: Scope, send: Send) -> None:
        try:
            open_operator_key(self._secret, key_of(scope["headers"]))
        except KeyRefused as refused:
            await refuse(send, None, 401, str(refused))
            return
        await respond(send, 200, await self.status())

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.shutdown":
                await self.close()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
