"""The worker's end of an adapter's swap: its tensors from memory into vLLM's LoRA layers.

vLLM itself loads adapters from folders only, and leaves out what it has no layer for; here that is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from lightning_ray.policy.adapter_serving import ADAPTER_ID


def load_adapter(
    manager: Any, weights: Iterable[tuple[str, torch.Tensor]], rank: int, alpha: float, whole: bool
) -> None:
    """Put an adapter, by PEFT's names, in the place of the one that vLLM's ``WorkerLoRAManager`` holds.

    ``whole`` says that this worker has all of the model's layers. Raises ValueError that names a tensor which is
    missing, of another rank, or has no LoRA layer; the old adapter stays then.
    """
    adapters = manager._adapter_manager
    mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        lora_model_id=ADAPTER_ID,
        # vLLM scales B in place; what came is read-only.
        tensors={name: tensor.clone() for name, tensor in weights},
        peft_helper=PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[]),  # type: ignore[arg-type]
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    check(adapter.loras, set(adapters.modules).union(*adapters.packed_modules.values()) if whole else None, rank)
    adapters.remove_adapter(ADAPTER_ID)
    adapters.add_adapter(adapter)
    adapters.activate_adapter(ADAPTER_ID)


def check(layers: dict[str, Any], known: set[str] | None, rank: int) -> None:
    """Raise ValueError unless each layer has both matrices, of that rank, and is ``known``."""
    if not layers:
        raise ValueError("the adapter has no tensors")
    for name, layer in layers.items():
        for part, matrix, axis in (("lora_A", layer.lora_a, 0), ("lora_B", layer.lora_b, 1)):
            if matrix is None:
                raise ValueError(f"the adapter has no {name}.{part}")
            if matrix.shape[axis] != rank:
                raise ValueError(f"{name}.{part} has shape {list(matrix.shape)}, which is not of rank {rank}")
        if known is not None and name not in known:
            raise ValueError(
                f"vLLM has no LoRA layer for the adapter's {name}: leave it out of lora.target_modules, or send whole "
                "weights by engine.transfer='object' (on CUDA 'nccl')"
            )
