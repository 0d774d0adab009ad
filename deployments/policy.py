"""The policy deployment: vLLM behind its own OpenAI/Anthropic app, as a Ray Serve deployment with capture.

HTTP is for agents alone: an attempt's key opens that attempt's routes. Control (weight swaps, proofs, status) goes
through methods of the deployment handle, which Serve can broadcast to every live replica. Invariant: a replica
answers only under weights that it has proved; a fresh one waits for its first push, so that a replica that
restarts or joins later never serves old weights.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from ray import serve

from deployments.handlers import handlers_kept
from deployments.lifetime import CHECK_SECONDS, end_with
from deployments.temporary import keep_with_ray
from deployments.weights import Weights
from lightning_ray.capture.audience import POLICY
from lightning_ray.capture.conversations import Attempt, Conversations
from lightning_ray.capture.edge import Backend, CaptureEdge, Limits
from lightning_ray.capture.engine import CapturedEngine
from lightning_ray.config import EngineSettings
from lightning_ray.deaths.last_words import failure_written
from lightning_ray.loading import uncollected
from lightning_ray.metrics.replica import ReplicaMetrics
from lightning_ray.mirror.nodes import present
from lightning_ray.policy import engine_failure
from lightning_ray.policy.adapter_serving import AdapterRequests, with_adapter
from lightning_ray.policy.engine_arguments import engine_arguments
from lightning_ray.policy.engine_load import EngineLoad
from lightning_ray.policy.loaded import Loaded
from lightning_ray.policy.stalls import StallWatch
from lightning_ray.run.state import ONLY
from lightning_ray.store.schema import spans_to_batch

if TYPE_CHECKING:
    from lightning_ray.store.base import Store

READY_SECONDS = 60.0
"""How long a request waits for a replica to be proved before it is answered 503."""


@serve.deployment(name="policy", max_queued_requests=-1, health_check_period_s=CHECK_SECONDS)
@serve.ingress()
class Policy(Weights):
    """One replica: an AsyncLLM engine, vLLM's app over it, and capture around both."""

    def __init__(
        self,
        model: str,
        model_name: str,
        settings: EngineSettings,
        store: Store,
        secret: bytes,
        loaded: Loaded | None = None,
        audience: str = POLICY,
        tags: Mapping[str, str] | None = None,
    ):
        super().__init__(settings)
        self.model = model
        self.model_name = model_name
        self.store = store
        self.secret = secret
        self.audience = audience
        self.loaded = loaded
        self.loaded_diff: float | None = None
        self.load = EngineLoad()
        self.stalls = StallWatch(self.load, settings.stall_seconds)
        tags = {"run": "", "policy": ONLY} if tags is None else tags
        self.metrics = ReplicaMetrics(tags, self.replica_id, lambda: {**self.describe(), **self.load.as_dict()})
        self._reporting: asyncio.Task[None] | None = None
        self.edge: CaptureEdge | None = None

    async def __serve_build_asgi_app__(self) -> CaptureEdge:
        """Start the engine and wrap vLLM's own app."""
        with uncollected():
            return await self._build()

    async def _build(self) -> CaptureEdge:
        keep_with_ray()
        with handlers_kept():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.entrypoints.launchers.api_server.app_state import init_app_state
            from vllm.entrypoints.launchers.app import build_app
            from vllm.entrypoints.launchers.cli_args import make_arg_parser
            from vllm.usage.usage_lib import UsageContext
            from vllm.utils.argparse_utils import FlexibleArgumentParser
            from vllm.v1.engine.async_llm import AsyncLLM

        from lightning_ray.policy.canary_scheduler import with_canaries_first

        await asyncio.to_thread(present, Path(self.model))
        settings = self.settings
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(engine_arguments(self.model, self.model_name, settings))
        engine_args = AsyncEngineArgs.from_cli_args(args)
        self.settings = with_adapter(settings, engine_args, self.model)
        config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        with_canaries_first(config.scheduler_config)
        with engine_failure.told(settings), self._engine_place():
            self.engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True, stat_loggers=[self.load.logger()])
        self.adapter = AdapterRequests(self.engine)
        conversations = Conversations(self.engine.renderer.tokenizer, self._said) if settings.continuation else None
        self.capture = CapturedEngine(self.engine, version=-1, conversations=conversations)
        tasks = await self.engine.get_supported_tasks()
        app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, args, tasks)
        if self.loaded is not None:
            await self._vouch(self.loaded)
        limits = Limits(settings.max_body_mb * 2**20, settings.max_calls_per_attempt)
        backend = Backend(self._ready, lambda: self.describe()["version"], self.status, self.audience, self.model_name)
        self._reporting = asyncio.create_task(self.metrics.report())
        self.edge = CaptureEdge(app, self.secret, self._append, backend, limits)
        return self.edge

    async def _vouch(self, loaded: Loaded) -> None:
        """Answer under the weights of the model's folder, if they do as its canaries say; there will be no swap."""
        assert self.capture is not None
        await self.engine.update_weight_version(str(loaded.version))
        self.capture.mark_swap(loaded.version)
        if not loaded.canaries:
            self.capture.proved.set()
            return
        canaries, expected = ([list(row) for row in rows] for rows in (loaded.canaries, loaded.expected))
        shown = await self.prove(loaded.version, canaries, expected, loaded.tolerance)  # type: ignore[arg-type]
        self.loaded_diff = shown["max_logprob_diff"]

    def _engine_place(self) -> AbstractContextManager[None]:
        if self.settings.chosen_process == "own":
            return nullcontext()
        from lightning_ray.policy.engine_thread import engine_on_a_thread

        return engine_on_a_thread()

    async def _append(self, rows: list[dict[str, Any]]) -> None:
        self.metrics.note(rows)
        await self.store.append_spans(spans_to_batch(rows), synced=False)

    async def _said(self, attempt: Attempt) -> Sequence[Sequence[int]]:
        """What an attempt's calls at other replicas were."""
        rollout_id, attempt_id = attempt
        spans = await self.store.scan_spans([rollout_id], attempt_id, ["prompt_ids", "sampled_ids", "status"])
        calls = spans.filter(pc.and_(pc.is_valid(spans["prompt_ids"]), pc.equal(spans["status"], "OK")))
        pairs = zip(calls["prompt_ids"].to_pylist(), calls["sampled_ids"].to_pylist(), strict=True)
        return [prompt + sampled for prompt, sampled in pairs]

    async def _ready(self) -> str | None:
        assert self.capture is not None
        if self.capture.proved.is_set():
            return None
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.capture.proved.wait()
        except TimeoutError:
            return f"replica {self.replica_id} has no proved weights after {READY_SECONDS:.0f} s; try again later"
        return None

    async def status(self) -> dict[str, Any]:
        """``describe``, how busy the engine is, the calls at work, and the latest swaps."""
        busy = self.load.as_dict() | (self.edge.calls() if self.edge else {})
        return {**self.describe(), **busy, "swapping_since": self.swapping_since, "swaps": list(self.swaps)}

    def describe(self) -> dict[str, Any]:
        """Identity and state of this replica."""
        assert self.capture is not None
        return {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            "workers": self.engine.vllm_config.parallel_config.world_size,
            "vocabulary": self.engine.model_config.get_vocab_size(),
            "max_model_len": self.engine.model_config.max_model_len,
            "transfer": self.settings.chosen_transfer,
            "version": self.capture.version,
            "proved": self.capture.proved.is_set(),
            "swapping": self.swapping_since is not None or self.asleep,
            "loaded_diff": self.loaded_diff,
        }

    async def check_health(self) -> None:
        """Raise when the engine is dead or hangs, or a swap has been open past its deadline: Serve then restarts the
        replica.

        When the run is gone, its application is deleted.
        """
        await end_with(self.store.actors)
        with failure_written():
            await self._check()

    async def _check(self) -> None:
        if self.engine is None:
            return
        if self.given_up:
            raise RuntimeError(f"replica {self.replica_id} could not prove its weights and is to be restarted")
        await self.engine.check_health()
        if self.swapping_since is not None:
            open_for = time.time() - self.swapping_since
            if open_for > self.settings.swap_timeout_seconds:
                raise RuntimeError(f"a weight swap has been open for {open_for:.0f} s on replica {self.replica_id}")
        at_work = self.engine.output_processor.has_unfinished_requests()
        held_up = (
            min(self.edge.held_up(), time.monotonic() - self.capture.reached) if self.edge and self.capture else 0.0
        )
        self.stalls.check(at_work, self.asleep or self.swapping_since is not None, held_up)

    def __del__(self) -> None:
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()
