"""How vLLM serves a LoRA adapter that is trained meanwhile: one adapter, which every request is computed with.

The adapter keeps one id, so that requests in flight go on with the new tensors, as they do over a swap of whole
weights; its name tells the version, by which vLLM tells its cached prefixes apart.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, get_args

from lightning_ray.config import EngineSettings
from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import matrix_names

ADAPTER_ID = 1


def with_adapter(settings: EngineSettings, engine_args: Any, model: str) -> EngineSettings:
    """Have an engine of these ``AsyncEngineArgs`` serve an adapter, if the settings send one.

    Returns the settings, or where they leave the choice and vLLM has no LoRA for the model, such as send whole weights.
    Raises ConfigError where they insist.
    """
    if settings.chosen_transfer != "adapter":
        return settings
    from vllm.config.lora import MaxLoRARanks
    from vllm.model_executor.models import ModelRegistry, supports_lora

    config = engine_args.create_model_config()
    model_class, architecture = ModelRegistry.resolve_model_cls(config.architectures, config)
    room = [rank for rank in get_args(MaxLoRARanks) if rank >= settings.adapter_rank]
    if not supports_lora(model_class) or not room:
        if settings.transfer == "auto":
            return settings.model_copy(update={"adapter_rank": 0})
        largest = max(get_args(MaxLoRARanks))
        raise ConfigError(
            f"engine.transfer='adapter': vLLM has no LoRA of rank {settings.adapter_rank} for {architecture} (its "
            f"largest rank is {largest}); engine.transfer='auto' sends whole weights then, with the adapter merged in"
        )
    engine_args.enable_lora = True
    engine_args.max_loras = 1
    engine_args.max_lora_rank = room[0]
    embeddings = getattr(model_class, "embedding_modules", {})
    engine_args.lora_target_modules = sorted(matrix_names(Path(model)) - set(embeddings)) or None
    return settings


class AdapterRequests:
    """Installs itself as ``engine.generate``, and has every request computed with the adapter, once there is one."""

    def __init__(self, engine: Any):
        self._generate = engine.generate
        self._request: Any = None
        engine.generate = self.generate

    def serve(self, version: int) -> None:
        """From here on requests name the adapter of that version, which the workers hold."""
        from vllm.lora.request import LoRARequest

        self._request = LoRARequest(f"version-{version}", ADAPTER_ID, "loaded from memory")

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncGenerator[Any, None]:
        """As ``AsyncLLM.generate``."""
        if self._request is not None:
            options["lora_request"] = self._request
        found: AsyncGenerator[Any, None] = self._generate(prompt, sampling_params, request_id, **options)
        return found
