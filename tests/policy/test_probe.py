"""Probes of a trainer's tensors and of an engine's modules, which fuse what the trainer has apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_ray.policy.probe import engine_probes, trainer_probes
from lightning_ray.policy.proof import differing_kinds

LAYER = "model.layers.0.self_attn"
SIZES = {"q_proj": 24, "k_proj": 8, "v_proj": 8}


class Apply:
    """A quant method of vLLM's, as a layer has one."""

    def apply(self, layer: Any, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, layer.weight, bias)


class Fused(torch.nn.Module):
    """A layer of vLLM's that computes several of the checkpoint's matrices as one."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, sizes: list[int]):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        self.input_size, self.output_sizes = weight.shape[1], sizes
        self.quant_method = Apply()


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    matrices = {f"{LAYER}.{part}.weight": torch.randn(size, 32) * 0.1 for part, size in SIZES.items()}
    biases = {f"{LAYER}.{part}.bias": torch.randn(size) for part, size in SIZES.items()}
    return {**matrices, **biases, f"{LAYER}.q_norm.weight": torch.ones(16), f"{LAYER}.q_norm.bias": torch.zeros(16)}


def engine_of(held: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The same weights, as an engine lays them."""
    model = torch.nn.Module()
    model.packed_modules_mapping = {"qkv_proj": list(SIZES)}  # type: ignore[assignment]
    parts = [[held[f"{LAYER}.{part}.{leaf}"] for part in SIZES] for leaf in ("weight", "bias")]
    fused = Fused(torch.cat(parts[0]), torch.cat(parts[1]), list(SIZES.values()))
    norm = torch.nn.LayerNorm(16)
    norm.load_state_dict({leaf: held[f"{LAYER}.q_norm.{leaf}"] for leaf in ("weight", "bias")})
    attention = torch.nn.ModuleDict({"qkv_proj": fused, "q_norm": norm})
    model.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": attention})])})
    return model


def test_the_same_weights_have_the_same_probes_however_they_lie() -> None:
    trainer = trainer_probes(weights().items())
    engine = engine_probes(engine_of(weights()))
    assert engine.keys() == trainer.keys()
    assert differing_kinds(trainer, engine) == {}


@pytest.mark.parametrize("name", weights())
def test_a_parameter_that_moved_a_little_anyhow_is_named_and_no_other(name: str) -> None:
    trainer = trainer_probes(weights().items())
    for seed in range(100):
        moved = weights()
        moved[name] = moved[name] + 1e-3 * torch.randn(moved[name].shape, generator=torch.Generator().manual_seed(seed))
        assert differing_kinds(trainer, engine_probes(engine_of(moved))) == {name.replace(".0.", ".*."): 1}, seed
