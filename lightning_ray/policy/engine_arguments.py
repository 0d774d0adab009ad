"""The engine's settings in the words of ``vllm serve``."""

from __future__ import annotations

from typing import Any

from lightning_ray.config import EngineSettings

WORKER_EXTENSION = "lightning_ray.policy.vllm_worker.WorkerExtension"
SHARED_GPU = 0.05
"""What of a GPU's memory must be free for an engine that starts beside a trainer rank: little, as it may come back when
the rank has taken its own. The KV cache is told in bytes, whatever is free.
"""


def engine_arguments(model: str, model_name: str, settings: EngineSettings) -> list[str]:
    """Arguments for vLLM's own parser."""
    cache = settings.chosen_kv_cache_mb
    arguments: dict[str, Any] = {
        "model": model,
        "served-model-name": model_name,
        "dtype": settings.chosen_dtype,
        "max-num-seqs": settings.max_num_seqs,
        "kv-cache-memory-bytes": None if cache is None else cache * 2**20,
        "gpu-memory-utilization": SHARED_GPU if settings.share_gpu else None,
        "tensor-parallel-size": settings.tensor_parallel,
        "pipeline-parallel-size": settings.pipeline_parallel,
        "distributed-executor-backend": _executor(settings),
        "worker-extension-cls": WORKER_EXTENSION,
        "weight-transfer-config": f'{{"backend": "{settings.whole_transfer}"}}',
        # On a shared GPU: as long as the small KV cache has room for, where nothing else is said.
        "max-model-len": settings.max_model_len or ("auto" if settings.share_gpu else None),
        "tool-call-parser": settings.tool_parser,
        "reasoning-parser": settings.reasoning_parser,
        "disable-log-stats": True,
        "disable-uvicorn-access-log": True,
        "enforce-eager": settings.device == "cpu",
        "enable-sleep-mode": settings.sleep,
        "enable-auto-tool-choice": settings.tool_parser is not None,
    }
    return _flat(arguments | settings.arguments)


def _executor(settings: EngineSettings) -> str:
    """One worker lives in the engine's process; several in this machine's, or on GPUs in the placement group's."""
    if settings.world_size == 1:
        return "uni"
    return "ray" if settings.device == "cuda" else "mp"


def _flat(arguments: dict[str, Any]) -> list[str]:
    """``{"a": 1, "b": True, "c": None, "d": False}`` -> ``["--a", "1", "--b"]``."""
    parts: list[str] = []
    for name, value in arguments.items():
        if value is True:
            parts.append(f"--{name}")
        elif value is not None and value is not False:
            parts += [f"--{name}", str(value)]
    return parts
