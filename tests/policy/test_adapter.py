"""A LoRA adapter in vLLM: whether it can be served, what is refused of it, and the arithmetic on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.config import EngineSettings, build
from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.policy.adapter_loading import check
from lightning_ray.policy.adapter_serving import AdapterRequests, with_adapter
from lightning_ray.policy.flat_weights import as_bytes, as_tensors
from lightning_ray.policy.model_folder import matrix_names
from lightning_ray.policy.object_transfer import borrowed, lend
from lightning_ray.policy.one_adapter import OneAdapterWrapper
from tests.e2e.tiny import make_tiny_model

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("engine", "rank", "chosen", "whole"),
    [
        ({}, 0, "object", "object"),
        ({}, 8, "adapter", "object"),
        ({"device": "cuda"}, 8, "adapter", "nccl"),
        ({"transfer": "object"}, 8, "object", "object"),
        ({"transfer": "gloo"}, 8, "gloo", "gloo"),
        ({"transfer": "adapter", "device": "cuda"}, 8, "adapter", "nccl"),
    ],
)
def test_lora_alone_sends_the_adapter_alone(engine: dict[str, Any], rank: int, chosen: str, whole: str) -> None:
    settings = GRPO(model="a/folder", lora={"rank": rank}, engine=engine).engine
    assert (settings.adapter_rank, settings.chosen_transfer, settings.whole_transfer) == (rank, chosen, whole)


def test_an_adapter_that_is_not_trained_cannot_be_sent() -> None:
    with pytest.raises(ConfigError, match=r"engine\.transfer='adapter' sends a LoRA adapter: set lora\.rank too"):
        build(GRPO, {"model": "a/folder", "engine": {"transfer": "adapter"}}, "algorithm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "model"
    make_tiny_model(folder)
    return folder


def arguments(folder: Path) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(model=str(folder), dtype="float32", max_model_len=128)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (3, 8), (16, 16), (300, 320)])
def test_vllm_is_told_to_make_room_for_the_adapter_in_linear_layers(folder: Path, rank: int, room: int) -> None:
    engine_args = arguments(folder)
    settings = EngineSettings(adapter_rank=rank)
    assert with_adapter(settings, engine_args, str(folder)) is settings
    assert (engine_args.enable_lora, engine_args.max_loras, engine_args.max_lora_rank) == (True, 1, room)
    assert matrix_names(folder) == LINEAR | {"embed_tokens"}
    assert set(engine_args.lora_target_modules) == LINEAR


def test_where_vllm_cannot_serve_it_whole_weights_are_sent_or_it_is_said(folder: Path) -> None:
    engine_args = arguments(folder)
    left = with_adapter(EngineSettings(adapter_rank=1000), engine_args, str(folder))
    assert left.chosen_transfer == "object" and not engine_args.enable_lora
    with pytest.raises(ConfigError, match=r"no LoRA of rank 1000 for Qwen3ForCausalLM \(its largest rank is 512\)"):
        with_adapter(EngineSettings(adapter_rank=1000, transfer="adapter"), engine_args, str(folder))


class Layer:
    def __init__(self, a: tuple[int, int] | None, b: tuple[int, int] | None):
        self.lora_a = None if a is None else torch.zeros(a)
        self.lora_b = None if b is None else torch.zeros(b)


@pytest.mark.parametrize(
    ("layers", "known", "told"),
    [
        ({}, None, "has no tensors"),
        ({"x.q_proj": Layer((4, 9), None)}, None, r"the adapter has no x\.q_proj\.lora_B"),
        ({"x.q_proj": Layer(None, (9, 4))}, None, r"the adapter has no x\.q_proj\.lora_A"),
        ({"x.q_proj": Layer((3, 9), (9, 4))}, None, r"lora_A has shape \[3, 9\], which is not of rank 4"),
        ({"x.q_proj": Layer((4, 9), (9, 3))}, None, r"lora_B has shape \[9, 3\], which is not of rank 4"),
        ({"x.odd": Layer((4, 9), (9, 4))}, {"x.q_proj"}, r"no LoRA layer for the adapter's x\.odd: leave it out"),
    ],
)
def test_what_is_refused_is_named(layers: dict[str, Layer], known: set[str] | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(layers, known, 4)


def test_what_is_whole_is_taken() -> None:
    layers = {"x.q_proj": Layer((4, 9), (9, 4)), "x.elsewhere": Layer((4, 9), (9, 4))}
    check(layers, None, 4)
    check(layers, {"x.q_proj", "x.elsewhere", "x.k_proj"}, 4)


@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize("tensors", [[("a", torch.arange(6.0)), ("b", torch.ones(2, 3))], []])
def test_what_is_lent_is_there_until_it_is_given_back(same_process: bool, tensors: list[Any]) -> None:
    parts, layout = as_bytes(tensors)
    with lend(parts, same_process) as name, borrowed(name, layout) as found:
        held = list(as_tensors(found, layout))
        assert [part.tobytes() for part in found] == [part.tobytes() for part in parts]
    assert all(torch.equal(tensor, own) for (_, tensor), (_, own) in zip(held, tensors, strict=True))
    told = r"not on .*: keep its workers on one node, or .*transfer='nccl'"
    with pytest.raises(InfrastructureError, match=told), borrowed(name, layout):
        pass


class Engine:
    """Remembers with what adapter a request came."""

    def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> Any:
        return request_id, options.get("lora_request")


def test_every_request_names_the_adapter_of_the_version_under_one_id() -> None:
    engine = Engine()
    adapter = AdapterRequests(engine)
    assert engine.generate("p", None, "a", lora_request=None) == ("a", None)
    requests = []
    for version in (4, 5):
        adapter.serve(version)
        requests.append(engine.generate("p", None, request_id="b", lora_request=None)[1])
    assert [request.lora_int_id for request in requests] == [1, 1]
    assert requests[0] != requests[1], "their cached prefixes are told apart by the name"


@pytest.mark.parametrize(
    "ids", [[1] * 7, [0] * 7, [1, 1, 0, 0, 1, 0, 0]], ids=["one adapter", "none", "some tokens without"]
)
def test_the_arithmetic_is_vllms(ids: list[int]) -> None:
    """The same as vLLM's own wrapper where all tokens have the adapter, or none; else vLLM's own."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    draw = torch.Generator().manual_seed(0)
    widths = (6, 3, 3)
    x = torch.randn(7, 10, generator=draw)
    base = torch.randn(7, sum(widths), generator=draw)
    a = tuple(torch.randn(1, 1, 4, 10, generator=draw) for _ in widths)
    b = tuple(torch.randn(1, 1, width, 4, generator=draw) for width in widths)
    found = []
    for kind in (PunicaWrapperCPU, OneAdapterWrapper):
        wrapper = kind(max_num_batched_tokens=16, max_batches=4, device="cpu")
        mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
        wrapper.update_metadata(mapping, [1], 2, 100)
        y = base.clone()
        wrapper.add_lora_linear(y, x, a, b, 0.5, widths)
        found.append(y)
    torch.testing.assert_close(found[1], found[0])
    if set(ids) == {1}:
        expected = base + 0.5 * torch.cat([x @ one[0, 0].T @ two[0, 0].T for one, two in zip(a, b, strict=True)], 1)
        torch.testing.assert_close(found[1], expected)
