"""What rides in vLLM's worker process: ways for weights into it, and the probes that explain a failed proof.

Given to vLLM by name (``worker_extension_cls``), so that it is there however the worker is started. A worker in a
process of its own ends with the process that started it: a replica that is killed leaves no engine behind.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from lightning_ray.policy import adapter_loading, gloo_transfer, object_transfer, one_adapter
from lightning_ray.policy.bits import engine_bit_sums
from lightning_ray.policy.digest import digest
from lightning_ray.policy.flat_weights import Layout, as_tensors
from lightning_ray.policy.probe import engine_probes

PARENT_SECONDS = 1.0

gloo_transfer.register()
object_transfer.register()
one_adapter.register()


class WorkerExtension:
    """Methods mixed into vLLM's worker, called by ``collective_rpc``."""

    def lightning_ray_probes(self) -> dict[str, list[float]]:
        """A few numbers for each parameter, as this worker computes with it."""
        return engine_probes(self.model_runner.model)  # type: ignore[attr-defined]

    def lightning_ray_bits(self) -> list[tuple[list[str], int]]:
        """Which weights this worker holds, to the bit (``policy.bits``)."""
        return engine_bit_sums(self.model_runner.model)  # type: ignore[attr-defined]

    def lightning_ray_digest(self) -> str:
        """The fingerprint of this worker's weights."""
        return digest(self.model_runner.model)  # type: ignore[attr-defined]

    lightning_ray_open = False
    """Whether a weight update was begun and not ended."""

    def lightning_ray_load(self, update_info: dict[str, Any], first: bool, last: bool) -> None:
        """A chunk of a weight update; the first begins it, the last ends it."""
        if first:
            if self.lightning_ray_open:  # and then broken off: what it left half loaded is loaded anew
                self._lightning_ray_end()
            self.start_weight_update()  # type: ignore[attr-defined]
            self.lightning_ray_open = True
        self.update_weights(update_info)  # type: ignore[attr-defined]
        if last:
            self._lightning_ray_end()

    def _lightning_ray_end(self) -> None:
        self._weight_update_active = True  # an update that failed is no longer active, yet open
        self.finish_weight_update()  # type: ignore[attr-defined]
        self.lightning_ray_open = False

    def lightning_ray_load_adapter(self, name: str, layout: Layout, rank: int, alpha: float) -> None:
        """Exchange the LoRA adapter for the lent one."""
        whole = self.parallel_config.pipeline_parallel_size == 1  # type: ignore[attr-defined]
        manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        with object_transfer.borrowed(name, layout) as parts:
            adapter_loading.load_adapter(manager, as_tensors(parts, layout), rank, alpha, whole)


def end_with_parent() -> None:
    """End this process once its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


end_with_parent()
