"""What vLLM is told of memory: sizes on CPU, shares on GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ray.config import EngineSettings
from lightning_ray.policy.engine_arguments import engine_arguments

BYTES, SHARE = "--kv-cache-memory-bytes", "--gpu-memory-utilization"


def told(**settings: Any) -> dict[str, str]:
    """What of the two is told."""
    words = engine_arguments("model", "policy", EngineSettings(**settings))
    return {name: words[words.index(name) + 1] for name in (BYTES, SHARE) if name in words}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {BYTES: str(128 * 2**20)}),
        ({"kv_cache_memory_mb": 16}, {BYTES: str(16 * 2**20)}),
        ({"device": "cuda"}, {}),
        ({"device": "cuda", "arguments": {"gpu-memory-utilization": 0.6}}, {SHARE: "0.6"}),
        ({"device": "cuda", "share_gpu": True}, {BYTES: str(2048 * 2**20), SHARE: "0.05"}),
        (
            {"device": "cuda", "share_gpu": True, "kv_cache_memory_mb": 512, "arguments": {SHARE[2:]: 0.3}},
            {BYTES: str(512 * 2**20), SHARE: "0.3"},
        ),
    ],
)
def test_the_memory_for_keys_and_values(settings: dict[str, Any], expected: dict[str, str]) -> None:
    assert told(**settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"device": "cuda"}, None),
        ({"device": "cuda", "share_gpu": True}, "auto"),
        ({"device": "cuda", "share_gpu": True, "max_model_len": 4096}, "4096"),
        ({"max_model_len": 512}, "512"),
    ],
)
def test_a_small_cache_on_a_shared_gpu_decides_how_long_a_context_may_be(
    settings: dict[str, Any], expected: str | None
) -> None:
    words = engine_arguments("model", "policy", EngineSettings(**settings))
    assert (words[words.index("--max-model-len") + 1] if "--max-model-len" in words else None) == expected
