"""The policy deployment: vLLM behind its own OpenAI/Anthropic app, as a Ray Serve deployment with capture.

HTTP is for agents alone: an attempt's key opens that attempt's routes. Control (weight swaps, proofs, status) goes
through methods of the deployment handle, which Serve can broadcast to every live replica. Invariant: a replica
answers only under weights that it has proved; a fresh one waits for its first push, so that a replica that
restarts or joins later never serves old weights.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from ray import serve

from deployments.handlers import handlers_kept
from deployments.lifetime import CHECK_SECONDS, end_with
from deployments.temporary import keep_with_ray
from lightning_ray.capture.audience import POLICY
from lightning_ray.capture.conversations import Attempt, Conversations
from lightning_ray.capture.edge import Backend, CaptureEdge, Limits
from lightning_ray.capture.engine import CapturedEngine
from lightning_ray.config import EngineSettings
from lightning_ray.deaths.last_words import FAILED_CHECK
from lightning_ray.loading import uncollected
from lightning_ray.metrics.replica import ReplicaMetrics
from lightning_ray.mirror.nodes import present
from lightning_ray.policy import engine_failure
from lightning_ray.policy.adapter_serving import AdapterRequests, with_adapter
from lightning_ray.policy.engine_arguments import engine_arguments
from lightning_ray.policy.engine_load import EngineLoad
from lightning_ray.policy.loaded import Loaded
from lightning_ray.policy.phases import Phases
from lightning_ray.policy.proof import CANARY, max_difference, unlike
from lightning_ray.policy.stalls import StallWatch
from lightning_ray.run.state import ONLY
from lightning_ray.store.schema import spans_to_batch

if TYPE_CHECKING:
    from lightning_ray.store.base import Store

READY_SECONDS = 60.0
"""How long a request waits for a replica to be proved before it is answered 503."""
SWAPS_KEPT = 100


@serve.deployment(name="policy", max_queued_requests=-1, health_check_period_s=CHECK_SECONDS)
@serve.ingress()
class Policy:
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
        self.settings = settings
        self.model = model
        self.model_name = model_name
        self.store = store
        self.secret = secret
        self.replica_id = uuid.uuid4().hex[:8]
        self.swapping_since: float | None = None
        self.asleep = False
        self._asked: tuple[int, list[list[int]], asyncio.Future[list[list[float]]]] | None = None
        """Canaries that run already: their version, and what they are to be compared with."""
        self.swaps: deque[dict[str, Any]] = deque(maxlen=SWAPS_KEPT)
        self.given_up = False
        self.audience = audience
        self.loaded = loaded
        self.loaded_diff: float | None = None
        self.load = EngineLoad()
        self.stalls = StallWatch(self.load, settings.stall_seconds)
        tags = {"run": "", "policy": ONLY} if tags is None else tags
        self.metrics = ReplicaMetrics(tags, self.replica_id, lambda: {**self.describe(), **self.load.as_dict()})
        self._reporting: asyncio.Task[None] | None = None
        self.engine: Any = None
        self.capture: CapturedEngine | None = None
        self.edge: CaptureEdge | None = None
        self.adapter: AdapterRequests

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

    # Control: called through the deployment handle, by broadcast.

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

    async def swap(self, version: int, offer: dict[str, Any], only: list[str] | None = None) -> dict[str, Any] | None:
        """Load the weights of an offer (see ``ObjectTransfer``) as ``version``, requests in flight frozen meanwhile,
        and prove it. ``only`` names the replicas that are meant; the others answer None.
        """
        if only is not None and self.replica_id not in only:
            return None
        phases = Phases()
        fetching = [asyncio.ensure_future(_fetch(chunk)) for chunk in offer["chunks"]]
        try:
            await fetching[0]  # while it is not there, sampling goes on
            phases.end("export")
            await self._freeze()
            phases.end("freeze")
            size, bits = 0, dict[str, int]()
            for place, chunk in enumerate(fetching):
                told, parts = await chunk
                phases.end("fetch")
                await self._load(told, parts, place == 0, place == len(fetching) - 1)
                phases.end("apply")
                size += sum(part.nbytes for part in parts)
                bits |= told.get("bits", {})
        finally:
            for chunk in fetching:
                chunk.cancel()
        if self.settings.chosen_transfer == "adapter":
            self.adapter.serve(version)
        proving = await self._ask_canaries(version, offer["canaries"])
        await self._thaw(version)
        found = await proving
        phases.end("prove")
        expected = [[float(x) for x in row] for row in await offer["expected"][0]]
        phases.end("expected")
        compared = await self._compared(bits)
        if compared:
            phases.end("compare")
        shown = self._judge(version, expected, found, offer["tolerance"], compared)
        return {**shown, "bytes": size, "phases": phases.seconds}

    async def _load(self, chunk: dict[str, Any], parts: Sequence[Any], first: bool, last: bool) -> None:
        """Have the engine load a chunk of the weights, or a whole adapter."""
        from lightning_ray.policy.object_transfer import lend

        with lend(parts, self.settings.chosen_process == "replica") as name:
            update = {"name": name, "layout": [list(entry) for entry in chunk["layout"]]}
            if "adapter" in chunk:
                await self.engine.collective_rpc("lightning_ray_load_adapter", kwargs={**update, **chunk["adapter"]})
            else:
                await self.engine.collective_rpc("lightning_ray_load", args=(update, first, last))

    async def connect(self, init_info: dict[str, Any], offsets: dict[str, int]) -> str:
        """Join the trainer's transfer group; ``offsets`` gives the group rank of each replica's first worker."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        own = {"rank_offset": offsets[self.replica_id]} if "rank_offset" in init_info else {}  # by IPC none meet
        info = init_info | own
        await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        return self.replica_id

    async def begin_swap(self) -> str:
        """Freeze running requests, drop every cached key and value, and open the weight update."""
        await self._freeze()
        await self.engine.start_weight_update()
        return self.replica_id

    async def sleep(self) -> str:
        """Give up the GPU's memory until the next swap; nobody is answered meanwhile."""
        await self._freeze()
        level = 1 if self.settings.chosen_transfer == "adapter" else 2  # the next swap brings no base to an adapter
        await self.engine.sleep(level, self.settings.swap_mode)
        self.asleep, self.swapping_since = True, None
        return self.replica_id

    async def _freeze(self) -> None:
        """From here on nothing is sampled and nobody is answered until the proof."""
        assert self.capture is not None
        self.swapping_since = time.time()
        if self.asleep:
            await self.engine.wake_up(["weights"])
            return
        # Not pause_generation: that sleeps for the outputs which flush() waits for.
        await self.engine.renderer.clear_mm_cache_async()
        await self.engine.engine_core.pause_scheduler_async(mode=self.settings.swap_mode, clear_cache=True)
        await self.capture.flush()
        self.capture.proved.clear()

    async def _thaw(self, version: int) -> None:
        """Go on sampling, under ``version``."""
        assert self.capture is not None
        self.capture.mark_swap(version)
        # Waking up resumes too, once nothing is asleep.
        going_on = self.engine.wake_up(["kv_cache"]) if self.asleep else self.engine.resume_generation()
        await asyncio.gather(self.engine.update_weight_version(str(version)), going_on)
        self.asleep = False
        began, self.swapping_since = self.swapping_since, None
        took = None if began is None else round(time.time() - began, 4)
        self.swaps.append({"version": version, "time": time.time(), "seconds": took, "proved": False})

    async def update_weights(self, update_info: dict[str, Any]) -> str:
        """Receive the weights; runs while the trainer broadcasts."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        return self.replica_id

    async def end_swap(self, version: int, canaries: list[list[int]] | None = None) -> str:
        """Close the update under its version and let the frozen requests go on, behind the canaries that ``prove`` will
        ask for; their answers wait for the proof.
        """
        await self.engine.finish_weight_update()
        self._asked = (version, canaries, await self._ask_canaries(version, canaries)) if canaries else None
        await self._thaw(version)
        return self.replica_id

    def give_up(self, replica_ids: list[str]) -> str:
        """Say that a replica cannot be mended: Serve then restarts it."""
        if self.replica_id in replica_ids:
            self.given_up = True
        return self.replica_id

    async def prove(
        self,
        version: int,
        canaries: list[list[int]],
        expected: list[list[float]],
        tolerance: float,
        bits: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Compare the canaries' logprobs, and bits where there are some, with the trainer's; only agreement lets this
        replica answer again.
        """
        asked, self._asked = self._asked, None
        known = asked is not None and asked[:2] == (version, canaries)
        found = await (asked[2] if asked is not None and known else await self._ask_canaries(version, canaries))
        return self._judge(version, expected, found, tolerance, await self._compared(bits))

    async def _compared(self, bits: Mapping[str, int] | None) -> dict[str, Any]:
        """Which parameters the engine holds with other bits than the trainer. Where several workers share a matrix
        nothing is compared.
        """
        if not bits or self.settings.world_size > 1:
            return {}
        [held] = await self.engine.collective_rpc("lightning_ray_bits")
        kinds, compared = unlike(bits, held)
        return {"unlike": kinds, "compared": compared / len(bits)}

    async def _ask_canaries(self, version: int, canaries: list[list[int]]) -> asyncio.Future[list[list[float]]]:
        """The canaries' logprobs by the engine, which has been asked: what is resumed after this comes after them."""
        assert self.capture is not None
        names = [f"{CANARY}{version}-{index}-{uuid.uuid4().hex[:6]}" for index in range(len(canaries))]
        asked = [self.capture.prompt_logprobs(ids, name) for ids, name in zip(canaries, names, strict=True)]
        answers = asyncio.ensure_future(asyncio.gather(*asked))
        await self.capture.submitted(names)
        return answers

    def _judge(
        self,
        version: int,
        expected: list[list[float]],
        found: list[list[float]],
        tolerance: float,
        compared: Mapping[str, Any],
    ) -> dict[str, Any]:
        assert self.capture is not None
        difference = max_difference(expected, found)
        proved = difference <= tolerance and self.capture.version == version and not compared.get("unlike")
        if self.swaps:
            self.swaps[-1] |= {"proved": proved, "max_logprob_diff": difference, **compared}
        if proved:
            self.capture.proved.set()
        own = {"replica_id": self.replica_id, "version": self.capture.version}
        return {**own, "max_logprob_diff": difference, **compared}

    async def probes(self) -> dict[str, Any]:
        """A few numbers for each parameter, to tell which differ after a failed proof."""
        numbers = await self.engine.collective_rpc("lightning_ray_probes")
        return {"replica_id": self.replica_id, "probes": numbers[0]}

    async def digest(self) -> dict[str, Any]:
        """A fingerprint of the weights that are served, by worker (``policy.digest``)."""
        return {"replica_id": self.replica_id, "digests": await self.engine.collective_rpc("lightning_ray_digest")}

    async def check_health(self) -> None:
        """Raise when the engine is dead or hangs, or a swap has been open past its deadline: Serve then restarts the
        replica.

        When the run is gone, its application is deleted.
        """
        await end_with(self.store.actors)
        try:
            await self._check()
        except Exception as error:
            print(f"{FAILED_CHECK}{error}", file=sys.stderr, flush=True)  # Serve itself writes that it failed, not why
            raise

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


async def _fetch(chunk: Any) -> tuple[dict[str, Any], Any]:
    """What rank 0 says of a chunk, and its bytes on this node."""
    told = await chunk
    return told, await told["weights"][0]
