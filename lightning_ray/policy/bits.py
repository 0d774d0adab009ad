"""Which weights an engine holds, to the bit: what its logprobs cannot tell in numbers coarser than float32.

Rounding alone moves a bfloat16 logprob further than one update does, so an engine that kept its old weights would pass
the canaries. Each pattern of 16 bits has a number, and those of a parameter are summed up, in any order: parts that an
engine lays side by side or transposes add up to the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

PART = 2**22
"""Elements whose numbers are in memory at once."""


@cache
def _numbers(device: torch.device) -> torch.Tensor:
    """A number for each pattern, as splitmix64 mixes them: of the patterns themselves, steps up and down would cancel
    out. Zero has 0, as engines pad vocabularies with it.
    """
    numbers = torch.arange(2**16, dtype=torch.int64)
    for factor in (-7046029254386353131, -4658895280553007687, -7723592293110705685):
        numbers = numbers * factor
        numbers = numbers ^ (numbers >> 29)
    return numbers.to(device)


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, over a bfloat16 tensor, of the numbers of its elements' bits: one int64, on the tensor's device."""
    patterns = tensor.detach().view(torch.int16).reshape(-1)
    numbers = _numbers(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in patterns.split(PART):
        total += numbers[part.long() & 0xFFFF].sum()
    return total


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
