"""A fingerprint of what an engine serves: equal before and after if not one bit of its weights was changed.

Parameters and buffers by their bytes; and what each module computes of a fixed vector, as a packed matrix may lie where
no parameter shows it.
"""

from __future__ import annotations

import hashlib
import itertools

import torch

from lightning_ray.policy.probe import engine_probes


def digest(model: torch.nn.Module) -> str:
    """SHA-256, in hexadecimal, of an engine's model."""
    total = hashlib.sha256()
    for name, tensor in sorted(itertools.chain(model.named_parameters(), model.named_buffers()), key=lambda kv: kv[0]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, value in sorted(engine_probes(model).items()):
        total.update(f"{name} {value!r}\0".encode())
    return total.hexdigest()
