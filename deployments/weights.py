"""The weights of a replica: loaded while its running requests are frozen, and proved before anybody is answered.

    freeze  --nothing is sampled-->  load  -->  thaw under the new version  --answers wait-->  prove  -->  answer

These are methods of the policy deployment, called through its handle, which Serve can broadcast to every live replica.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ray.capture.engine import CapturedEngine
from lightning_ray.config import EngineSettings
from lightning_ray.policy.adapter_serving import AdapterRequests
from lightning_ray.policy.phases import Phases
from lightning_ray.policy.proof import CANARY, max_difference, unlike

SWAPS_KEPT = 100


class Weights:
    """Those of one replica's engine."""

    engine: Any
    """vLLM's AsyncLLM; None while it is not up."""
    capture: CapturedEngine | None
    adapter: AdapterRequests

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.engine = self.capture = None
        self.replica_id = uuid.uuid4().hex[:8]
        self.swapping_since: float | None = None
        self.asleep = False
        self._asked: tuple[int, list[list[int]], asyncio.Future[list[list[float]]]] | None = None
        """Canaries that run already: their version, and what they are to be compared with."""
        self.swaps: deque[dict[str, Any]] = deque(maxlen=SWAPS_KEPT)
        self.given_up = False

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


async def _fetch(chunk: Any) -> tuple[dict[str, Any], Any]:
    """What rank 0 says of a chunk, and its bytes on this node."""
    told = await chunk
    return told, await told["weights"][0]
