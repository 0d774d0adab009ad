"""A model's weights as plain bytes, and back: what travels through Ray's object store, without a rendezvous.

The object store takes numpy arrays with one copy and hands them to readers on a node with none; torch tensors it would
pickle.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

Layout = list[tuple[str, str, list[int]]]
"""Name, dtype and shape of each tensor."""


def as_bytes(weights: Iterable[tuple[str, torch.Tensor]]) -> tuple[list[np.ndarray], Layout]:
    """The bytes of each tensor (uint8; views where the tensor is on the CPU), and their layout."""
    parts: list[np.ndarray] = []
    layout: Layout = []
    for name, tensor in weights:
        whole = tensor.detach().cpu().contiguous()
        parts.append(whole.view(-1).view(torch.uint8).numpy())
        layout.append((name, str(whole.dtype).removeprefix("torch."), list(whole.shape)))
    return parts, layout


def cut(
    weights: Iterable[tuple[str, torch.Tensor]], chunks: int, size: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """So many runs of the tensors, all but the last of ``size`` bytes or some more, the last ones maybe empty.

    A layer of the model (a name up to its first number) is not cut apart: engines load it whole.
    """
    left, held, block = chunks, list[tuple[str, torch.Tensor]](), ""
    filled = 0
    for name, tensor in weights:
        if left > 1 and filled >= size and block != _block(name):
            yield held
            left, held, filled = left - 1, [], 0
        held.append((name, tensor))
        filled += tensor.numel() * tensor.element_size()
        block = _block(name)
    yield held
    yield from ([] for _ in range(left - 1))


def _block(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``; a name without a number as it is."""
    block = re.match(r".*?\.\d+(?=\.)", name)
    return name if block is None else block[0]


def as_tensors(parts: Sequence[np.ndarray], layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, as views of their bytes. Raises ValueError if these are not what the layout says."""
    if len(parts) != len(layout):
        raise ValueError(f"there are {len(parts)} tensors, the layout names {len(layout)}")
    for part, (name, dtype, shape) in zip(parts, layout, strict=True):
        if part.nbytes != size_of(dtype, shape):
            raise ValueError(f"{name} has {part.nbytes} bytes, not {size_of(dtype, shape)} of {dtype} {shape}")
        yield name, _tensor(part).view(getattr(torch, dtype)).view(shape)


def split(flat: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """Bytes that lie end to end, tensor by tensor."""
    ends = np.cumsum([size_of(dtype, shape) for _, dtype, shape in layout])
    if len(ends) and ends[-1] != flat.nbytes:
        raise ValueError(f"the weights have {flat.nbytes} bytes, their layout says {ends[-1]}")
    return np.split(flat, ends[:-1])


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    itemsize: int = getattr(torch, dtype).itemsize
    return itemsize * int(np.prod(shape, dtype=np.int64))


def _tensor(part: np.ndarray) -> torch.Tensor:
    address, _ = part.__array_interface__["data"]
    if address % 8:
        part = part.copy()  # a view of wider items wants them aligned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that must not be written to
        return torch.from_numpy(part)
