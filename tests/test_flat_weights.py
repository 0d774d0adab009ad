"""Weights as bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_ray.policy.flat_weights import as_bytes, as_tensors, cut, size_of, split

WEIGHTS = [
    ("a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
    ("b", torch.tensor([1.5, -2.0, 3.0]).to(torch.bfloat16)),
    ("c", torch.arange(12.0).reshape(3, 4).t()),
    ("d", torch.tensor(7, dtype=torch.int64)),
]


def test_what_goes_in_comes_out() -> None:
    parts, layout = as_bytes(WEIGHTS)
    assert layout[1] == ("b", "bfloat16", [3]) and [part.nbytes for part in parts] == [24, 6, 48, 8]
    for (name, tensor), (found, got) in zip(WEIGHTS, as_tensors(parts, layout), strict=True):
        assert name == found and got.dtype == tensor.dtype and torch.equal(got, tensor)


def test_end_to_end_in_one_buffer_though_it_is_not_aligned() -> None:
    parts, layout = as_bytes(WEIGHTS)
    flat = np.concatenate([np.zeros(1, np.uint8), *parts])[1:]
    flat.flags.writeable = False
    for (_, tensor), (_, got) in zip(WEIGHTS, as_tensors(split(flat, layout), layout), strict=True):
        assert torch.equal(got, tensor)


def test_bytes_that_are_not_what_the_layout_says_are_refused_by_name() -> None:
    parts, layout = as_bytes(WEIGHTS)
    with pytest.raises(ValueError, match="3 tensors, the layout names 4"):
        list(as_tensors(parts[1:], layout))
    with pytest.raises(ValueError, match=r"b has 5 bytes, not 6 of bfloat16 \[3\]"):
        list(as_tensors([parts[0], parts[1][:-1], *parts[2:]], layout))
    with pytest.raises(ValueError, match="85 bytes, their layout says 86"):
        split(np.concatenate(parts)[:-1], layout)
    assert size_of("float32", [2, 0]) == 0


def layers(*names: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.zeros(10, dtype=torch.float32)) for name in names]


MODEL = layers(
    "model.embed.weight",
    "model.layers.0.mlp.up.weight",
    "model.layers.0.mlp.down.weight",
    "model.layers.1.mlp.up.weight",
    "model.layers.1.mlp.down.weight",
    "model.layers.10.mlp.experts.3.up.weight",
    "model.layers.10.mlp.experts.4.up.weight",
    "model.norm.weight",
)


@pytest.mark.parametrize(
    ("chunks", "size", "lengths"),
    [
        (1, 0, [8]),
        (2, 40, [1, 7]),
        (3, 41, [3, 2, 3]),
        (4, 80, [3, 2, 2, 1]),
        (5, 81, [3, 4, 1, 0, 0]),
        (3, 1000, [8, 0, 0]),
        (9, 1, [1, 2, 2, 2, 1, 0, 0, 0, 0]),
    ],
)
def test_chunks_are_of_a_size_and_keep_layers_whole(chunks: int, size: int, lengths: list[int]) -> None:
    found = list(cut(MODEL, chunks, size))
    assert [len(chunk) for chunk in found] == lengths
    assert [name for chunk in found for name, _ in chunk] == [name for name, _ in MODEL]
