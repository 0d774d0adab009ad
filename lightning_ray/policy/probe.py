"""Which parameters differ: a few numbers for each, comparable between the trainer's tensors and the engine's modules.

A matrix W [out, in] is probed as U (W x) with fixed pseudo-random x and U [``NUMBERS``, out], a vector w as U w. The
engine may fuse, pack or transpose its matrices; a probe only needs what the module computes, so what it finds is what
serves.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

NUMBERS = 8
"""Of one alone, one change in a hundred would be lost: it looks in a single direction."""
Probe = list[float]


def inputs_of(size: int) -> torch.Tensor:
    """The fixed input x: a unit vector of ``size`` float32 entries."""
    vector = torch.rand(size, generator=torch.Generator().manual_seed(_seed("in", size))) + 0.5
    return vector / vector.norm()


def output_probe(output: torch.Tensor) -> Probe:
    """U y of a module's output, float32."""
    flat = output.detach().float().flatten().cpu()
    generator = torch.Generator().manual_seed(_seed("out", flat.numel()))
    return (torch.randn(NUMBERS, flat.numel(), generator=generator) @ flat).tolist()  # type: ignore[no-any-return]


def tensor_probe(tensor: torch.Tensor) -> Probe:
    """The probe of a parameter in checkpoint form."""
    full = tensor.detach().float().cpu()
    return output_probe(full @ inputs_of(full.shape[-1]) if full.ndim >= 2 else full)


def trainer_probes(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Probe]:
    """Probes of the trainer's parameters, by checkpoint name."""
    return {name: tensor_probe(tensor) for name, tensor in weights}


def engine_probes(model: torch.nn.Module) -> dict[str, Probe]:
    """Probes of what the engine's modules compute, by checkpoint name. For an unsharded (TP 1) model."""
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    probes: dict[str, Probe] = {}
    for name, found in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf == "base_layer":
            continue  # probed with the LoRA layer around it
        module = getattr(found, "base_layer", found)
        method = getattr(module, "quant_method", None)
        if hasattr(module, "input_size") and method is not None:
            inputs = inputs_of(module.input_size)[None].to(_device(module), _dtype(module))
            output = method.apply(module, inputs, None)[0]
            if module is not found:
                output = output + _adapter_output(found, inputs[0])
            parts = fused.get(leaf, [leaf])
            sizes = module.output_sizes if len(parts) > 1 else [output.shape[0]]
            for part, piece in zip(parts, output.split(list(sizes)), strict=True):
                probes[f"{parent}.{part}.weight"] = output_probe(piece)
            if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
                for part, piece in zip(parts, bias.split(list(sizes)), strict=True):
                    probes[f"{parent}.{part}.bias"] = output_probe(piece)
        elif hasattr(module, "num_embeddings") and method is not None:
            probes.update(_embedding_probes(name, module, method))
        elif isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 1:
            probes |= {f"{name}.{own}": output_probe(tensor) for own, tensor in module.named_parameters(recurse=False)}
    return probes


def _adapter_output(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What the adapter of a vLLM LoRA layer adds for one token."""
    slices = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    return torch.cat([b[0, 0] @ (a[0, 0] @ inputs) for a, b in slices])


def _embedding_probes(name: str, module: torch.nn.Module, method: object) -> dict[str, Probe]:
    vocabulary = module.org_vocab_size
    table = module.weight[:vocabulary]  # type: ignore[index]
    vector = inputs_of(table.shape[1]).to(table.device)
    probes = {f"{name}.weight": output_probe(table.float() @ vector)}
    if hasattr(module, "cpu_linear") or type(module).__name__ == "ParallelLMHead":
        logits = method.apply(module, vector[None].to(table.dtype), None)[0]  # type: ignore[attr-defined]
        probes["lm_head.weight"] = output_probe(logits[:vocabulary])
    return probes


def _seed(salt: str, size: int) -> int:
    return zlib.crc32(f"{salt}:{size}".encode())


def _device(module: torch.nn.Module) -> torch.device:
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu")


def _dtype(module: torch.nn.Module) -> torch.dtype:
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) and weight.is_floating_point() else torch.float32
