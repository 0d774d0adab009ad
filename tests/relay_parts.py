"""A relay in front of fake upstreams, over real HTTP, and what it stored."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import httpx
from openai import AsyncOpenAI

from lightning_ray.capture.audience import relayed
from lightning_ray.capture.keys import Claims, issue_key
from lightning_ray.relay.app import RelayApp
from lightning_ray.relay.settings import Upstream
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.types import ProxyLLM
from tests.relay_upstream import KEY, FakeUpstream, listening

SECRET = b"s" * 32
PRICES = {"price_input_per_million": 2.0, "price_output_per_million": 10.0}
COST = (100 * 2.0 + 20 * 10.0) / 1e6


class Relayed:
    """A relay in front of fake upstreams, and what it stored."""

    def __init__(self) -> None:
        self.fake = FakeUpstream()
        self.rows: list[dict[str, Any]] = []
        self.address = ""
        self.app: RelayApp
        self.store_delay = 0.0
        self._stack = AsyncExitStack()

    async def append(self, rows: list[dict[str, Any]]) -> None:
        spans_to_batch(rows)
        await asyncio.sleep(self.store_delay)
        self.rows += rows

    async def start(self, **settings: Any) -> None:
        upstream = await self._stack.enter_async_context(listening(self.fake.app()))
        judge = {"base_url": f"{upstream}/v1", "api_key": KEY, **PRICES, "retry_seconds": 20, **settings}
        claude = Upstream(base_url=upstream, kind="anthropic", api_key=KEY, price_cached_input_per_million=0, **PRICES)
        self.app = RelayApp({"judge": Upstream(**judge), "claude": claude}, SECRET, self.append)
        self.address = await self._stack.enter_async_context(listening(self.app))

    async def stop(self) -> None:
        await self.app.close()
        await self._stack.aclose()

    def client(self, attempt: str = "at-1", upstream: str = "judge", **options: Any) -> AsyncOpenAI:
        base = ProxyLLM(endpoint=f"{self.address}/to/{upstream}/v1", model="m").get_base_url("ro-1", attempt)
        return AsyncOpenAI(base_url=base, api_key=self.key(attempt, upstream), **{"max_retries": 0, **options})

    def key(self, attempt: str = "at-1", upstream: str = "judge") -> str:
        return issue_key(SECRET, Claims("ro-1", attempt, time.time() + 60, {}, relayed(upstream)))

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(headers={"authorization": f"Bearer {self.key()}"}, base_url=self.address, timeout=20)

    async def row(self) -> dict[str, Any]:
        """The only row, when it is there."""
        for _ in range(300):
            if self.rows:
                break
            await asyncio.sleep(0.01)
        [row] = self.rows
        return row


def ask(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "policy", "messages": [{"role": "user", "content": text}], **more}


CHAT = "/to/judge/rollout/ro-1/attempt/at-1/v1/chat/completions"
