"""A replica for the capture benchmark: vLLM's app, bare on one port and captured on another, in one event loop.

Runs as a Ray actor, as a replica of Serve is one. On the bare port there is no current request, so that the engine half
lets calls pass. The engine is real; its ``generate`` is a stub's, unless it is asked to sample.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import nullcontext
from typing import Any

import uvicorn

from benchmarks.capture_model import prompts
from benchmarks.capture_stub import SAMPLED, StubEngine
from lightning_ray.capture.conversations import Conversations
from lightning_ray.capture.edge import Backend, CaptureEdge, Limits
from lightning_ray.capture.engine import CapturedEngine
from lightning_ray.config import EngineSettings
from lightning_ray.net import free_port
from lightning_ray.policy.engine_arguments import engine_arguments
from lightning_ray.policy.engine_thread import engine_on_a_thread
from lightning_ray.store.base import Store
from lightning_ray.store.schema import spans_to_batch


class Replica:
    """Both apps over one engine."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self._secret = secret
        self._append_seconds: list[float] = []
        self._servers: list[asyncio.Task[None]] = []

    async def start(self, model: str, model_name: str, settings: EngineSettings) -> tuple[int, int]:
        """Start the engine and both servers; their ports, bare and captured."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        args = make_arg_parser(FlexibleArgumentParser()).parse_args(engine_arguments(model, model_name, settings))
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        with engine_on_a_thread() if settings.chosen_process == "replica" else nullcontext():
            self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        self._tokenizer = self._engine.renderer.tokenizer
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, args, tasks)
        self._stub = StubEngine(self._engine, list(range(100, 100 + SAMPLED)))
        self._capture = CapturedEngine(self._engine)
        self._capture.proved.set()
        self.continue_conversations(settings.continuation)
        backend = Backend(self._ready, lambda: self._capture.version, self._status)
        limits = Limits(settings.max_body_mb * 2**20, settings.max_calls_per_attempt)
        edge = CaptureEdge(app, self._secret, self._append, backend, limits)
        gc.freeze()
        return await self._serve(app), await self._serve(edge)

    async def _serve(self, app: Any) -> int:
        port = free_port("127.0.0.1")
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", access_log=False))
        self._servers.append(asyncio.create_task(server.serve()))
        while not server.started:
            await asyncio.sleep(0.01)
        return port

    async def _append(self, rows: list[dict[str, Any]]) -> None:
        began = time.perf_counter()
        await self._store.append_spans(spans_to_batch(rows), synced=False)
        self._append_seconds.append(time.perf_counter() - began)

    async def _ready(self) -> str | None:
        return None

    async def _status(self) -> dict[str, Any]:
        return {}

    def prompts(self, count: int, tokens: int) -> list[list[dict[str, str]]]:
        """Messages whose prompts have so many tokens."""
        return prompts(self._tokenizer, count, tokens)

    def text(self, token_ids: list[int]) -> str:
        """What ids say."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def sampled(self) -> tuple[list[int], str]:
        """The ids that the stub samples, and their text."""
        return self._stub.sampled_ids, self.text(self._stub.sampled_ids)

    def sample(self, is_real: bool) -> None:
        """Whether the engine samples or its stub."""
        self._stub.is_stub = not is_real

    def take(self, seconds: float) -> None:
        """How long the stub takes from now on."""
        self._stub.seconds, self._stub.most_in_flight = seconds, 0

    def most_in_flight(self) -> int:
        """Calls that were in the stub at once, at most."""
        return self._stub.most_in_flight

    def continue_conversations(self, is_on: bool) -> None:
        """Whether prompts that continue a conversation keep its sampled ids."""
        self._capture.conversations = Conversations(self._tokenizer) if is_on else None

    def cpu(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    def append_seconds(self) -> list[float]:
        """How long each append since the last such call took, until it was durable."""
        seconds, self._append_seconds = self._append_seconds, []
        return seconds

    async def stop(self) -> None:
        """End the engine."""
        for server in self._servers:
            server.cancel()
        self._engine.shutdown()
