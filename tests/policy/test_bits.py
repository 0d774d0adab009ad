"""Bits of weights: what an engine lays out otherwise adds up to the same, and what it holds otherwise does not."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from lightning_ray.policy import bits
from lightning_ray.policy.bits import bit_sum, engine_bit_sums
from lightning_ray.policy.proof import Proof, failure_message, unlike
from lightning_ray.policy.publish import WeightPublisher

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}


class Engine(torch.nn.Module):
    """Weights as an engine has them: attention's three matrices in one, another transposed, a vocabulary padded."""

    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        given = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
        attention = "model.layers.0.self_attn"
        qkv = torch.cat([given[f"{attention}.{part}.weight"] for part in ("q_proj", "k_proj", "v_proj")])
        held = {
            "model.embed_tokens.weight": torch.nn.functional.pad(given["model.embed_tokens.weight"], (0, 0, 0, 48)),
            f"{attention}.qkv_proj.weight": qkv,
            f"{attention}.o_proj.weight": given[f"{attention}.o_proj.weight"].t(),
            "model.norm.weight": given["model.norm.weight"],
        }
        for name, tensor in held.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))


class Weights:
    """A trainer's float32 weights, gathered one after the other."""

    def __init__(self, dtype: str = "bfloat16"):
        draw = torch.Generator().manual_seed(0)
        self.settings: Any = SimpleNamespace(dtype=dtype)
        self.tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    named_adapter = named_weights


def exported(weights: Weights, monkeypatch: pytest.MonkeyPatch, chunks: int = 1) -> list[dict[str, Any]]:
    monkeypatch.setattr("ray.put", lambda parts: parts)
    publisher = WeightPublisher(weights, 0, "object")
    return [publisher.export(chunk, chunks, 200) or {} for chunk in range(chunks)]


@pytest.mark.parametrize("chunks", [1, 3])
def test_an_engine_that_holds_the_trainers_weights_is_alike_however_they_lie(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights()
    offers = exported(weights, monkeypatch, chunks)
    told = {name: value for offer in offers for name, value in offer["bits"].items()}
    assert list(told) == list(SHAPES)
    assert unlike(told, engine_bit_sums(Engine(weights.tensors))) == ({}, len(SHAPES))


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        ("model.norm.weight", {"model.norm.weight": 1}),
        ("model.layers.0.self_attn.o_proj.weight", {"model.layers.*.self_attn.o_proj.weight": 1}),
        (
            "model.layers.0.self_attn.k_proj.weight",
            {f"model.layers.*.self_attn.{part}_proj.weight": 1 for part in "qkv"},
        ),
    ],
)
def test_the_smallest_step_of_one_number_shows(
    changed: str, kinds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights()
    [offer] = exported(weights, monkeypatch)
    tensor = weights.tensors[changed]
    tensor.view(-1)[0] *= 1 + 2**-7  # the next bfloat16
    found, _ = unlike(offer["bits"], engine_bit_sums(Engine(weights.tensors)))
    assert found == kinds
    proof = Proof("r7", 3, 0.02, 0.5, found)
    assert not proof.holds and next(iter(kinds)) in failure_message(proof, {"something.else": 1})


def test_matrices_travel_in_the_engines_numbers_and_vectors_in_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        [offer] = exported(Weights(dtype), monkeypatch)
        numbers = sum(rows * columns for rows, columns in (shape for shape in SHAPES.values() if len(shape) == 2))
        assert offer["bytes"] == numbers * size + 8 * 4
        assert bool(offer["bits"]) == (dtype == "bfloat16")


def test_what_the_trainer_does_not_have_is_not_compared() -> None:
    assert unlike({"a": 1}, [(["b"], 5), (["a", "b"], 7)]) == ({}, 0)
    assert unlike({}, [(["a"], 1)]) == ({}, 0)


def test_a_step_up_and_a_step_down_do_not_cancel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "PART", 3)
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(40, generator=draw).to(torch.bfloat16)
    moved = weights.view(torch.int16).clone()
    moved[:20] += 1
    moved[20:] -= 1
    assert int(moved.sum()) == int(weights.view(torch.int16).sum())
    assert int(bit_sum(moved.view(torch.bfloat16))) != int(bit_sum(weights))
    assert int(bit_sum(weights[torch.randperm(40, generator=draw)])) == int(bit_sum(weights))
    assert int(bit_sum(-weights)) != int(bit_sum(weights)) and int(bit_sum(weights[:0])) == 0
