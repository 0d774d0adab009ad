"""What rides in vLLM's worker process: the gloo transfer engine and the probes that explain a failed proof.

Given to vLLM by name (``worker_extension_cls``), so that it is there however the worker is started.
"""

from __future__ import annotations

from lightning_ray.policy import gloo_transfer
from lightning_ray.policy.probe import engine_probes

gloo_transfer.register()


class WorkerExtension:
    """Methods mixed into vLLM's worker, called by ``collective_rpc``."""

    def lightning_ray_probes(self) -> dict[str, float]:
        """One number for each parameter, as this worker computes with it."""
        return engine_probes(self.model_runner.model)  # type: ignore[attr-defined]
