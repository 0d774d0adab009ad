"""Which weights an engine holds, to the bit: what its logprobs cannot tell in numbers coarser than float32.

Rounding alone moves a bfloat16 logprob further than one update does, so an engine that kept its old weights would pass
the canaries. A parameter's bit patterns are summed up as integers, in any order: parts that an engine lays side by side
or transposes add up to the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a bfloat16 tensor's elements, their bits read as int16: one int64, on the tensor's device."""
    return tensor.detach().view(torch.int16).sum(dtype=torch.int64)


def engine_bit_sums(model: torch.nn.Module) -> list[tuple[list[str], int]]:
    """Of each bfloat16 parameter of a model that one worker holds: the checkpoint names of its parts, and its bit sum.

    A matrix that was packed away (oneDNN's, on CPU) does not show its bits and is left out.
    """
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    sums = []
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.bfloat16 and parameter.numel():
            path, _, leaf = name.rpartition(".")
            owner, dot, module = path.rpartition(".")
            names = [f"{owner}{dot}{part}.{leaf}" for part in fused.get(module, [module])]
            sums.append((names, int(bit_sum(parameter))))
    return sums
