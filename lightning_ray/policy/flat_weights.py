"""A model's weights as one flat buffer, and back: what travels through Ray's object store, without a rendezvous.

The object store hands numpy bytes to readers on a node without a copy; torch tensors it would pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

Layout = list[tuple[str, str, list[int]]]
"""Name, dtype and shape of each tensor, in the order of their bytes."""


def flatten(weights: Iterable[tuple[str, torch.Tensor]]) -> tuple[np.ndarray, Layout]:
    """The tensors' bytes one after the other (uint8), and their layout."""
    parts: list[np.ndarray] = []
    layout: Layout = []
    for name, tensor in weights:
        whole = tensor.detach().contiguous().cpu()
        parts.append(whole.view(-1).view(torch.uint8).numpy().copy())
        layout.append((name, str(whole.dtype).removeprefix("torch."), list(whole.shape)))
    return np.concatenate(parts), layout


def unflatten(buffer: Any, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, as views of the buffer. Raises ValueError if it is of another size than the layout."""
    start = 0
    flat = np.frombuffer(buffer, np.uint8)
    expected = sum(size_of(dtype, shape) for _, dtype, shape in layout)
    if expected != flat.nbytes:
        raise ValueError(f"the weights have {flat.nbytes} bytes, their layout says {expected}")
    for name, dtype, shape in layout:
        end = start + size_of(dtype, shape)
        yield name, as_tensor(flat[start:end]).view(getattr(torch, dtype)).view(shape)
        start = end


def size_of(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor."""
    itemsize: int = getattr(torch, dtype).itemsize
    return itemsize * int(np.prod(shape, dtype=np.int64))


def as_tensor(flat: np.ndarray) -> torch.Tensor:
    """Bytes as a tensor that shares them; it is only read from."""
    address, _ = flat.__array_interface__["data"]
    if address % 8:
        flat = flat.copy()  # a tensor's view wants its items aligned
    if flat.flags.writeable:
        return torch.from_numpy(flat)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that must not be written to
        return torch.from_numpy(flat)
