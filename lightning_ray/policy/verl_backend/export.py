"""The policy's weights as whole tensors, under their Hugging Face names; a LoRA adapter merged in, or by itself.

Every function here is an iterator that every rank must exhaust: each tensor is gathered from all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightning_ray.policy.verl_backend.engine import PaddedEngine

WRAPPER = "base_model.model."
"""Before each name of a model that PEFT has wrapped."""
Named = Iterator[tuple[str, torch.Tensor]]


def whole_weights(engine: PaddedEngine) -> Named:
    """All weights, a tied head not repeated; W + (alpha / rank) B A where an adapter is.

    A tensor may share memory with the weights: use it before the next update.
    """
    module = engine.module
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in module.named_parameters()}
    if hasattr(module, "peft_config"):
        yield from _merged(module, tied)
        return
    weights, _ = engine.get_per_tensor_param()
    yield from ((name, tensor) for name, tensor in weights if name not in tied)


@torch.no_grad()
def _merged(module: Any, tied: set[str]) -> Named:
    adapted = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    for name, tensor in module.state_dict().items():
        if name in tied or ".lora_" in name:
            continue
        plain = name.removeprefix(WRAPPER).replace(".base_layer.", ".")
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner not in adapted or leaf != "weight":
            yield plain, _whole(tensor)
            continue
        layer = adapted[owner]
        product = _whole(layer.lora_B["default"].weight) @ _whole(layer.lora_A["default"].weight)
        product = product.T if layer.fan_in_fan_out else product
        yield plain, _whole(tensor) + layer.scaling["default"] * product


def adapter_weights(engine: PaddedEngine) -> Named:
    """The adapter's tensors by PEFT's names in a file, ``....q_proj.lora_A.weight``; nothing without an adapter."""
    for name, tensor in engine.module.state_dict().items():
        if ".lora_" in name:
            yield name.replace(".default.", "."), _whole(tensor)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
