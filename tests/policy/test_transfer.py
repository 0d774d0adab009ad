"""Ways for weights: what is asked of ranks and replicas, what does not count as a proof, which way is taken when."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.algorithms.policies import Policy
from lightning_ray.config import EngineSettings, build
from lightning_ray.errors import ConfigError, InfrastructureError, TrainersLostError
from lightning_ray.policy.phases import Phases
from lightning_ray.policy.publish import BUFFER_BYTES, WeightPublisher, load_transfer
from lightning_ray.policy.transfer import CHUNK_BYTES, MOST_CHUNKS, ObjectTransfer, transfer_of
from lightning_ray.serving import policy_options

MEMBERS = [{"replica_id": "r", "vocabulary": 100, "workers": 1}]


class Ranks:
    """Two ranks; each export is of ``each`` bytes in all."""

    def __init__(self, whole: int, lost: str | None = None):
        self.whole = whole
        self.lost = lost
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def begin(self, method: str, *args: Any) -> list[Any]:
        self.asked.append((method, args))
        return [(method, args, rank) for rank in range(2)]

    async def answers(self, references: Sequence[Any], method: str, timeout: float) -> list[Any]:
        if method == self.lost:
            raise TrainersLostError(f"trainer rank 0 died during {method!r}")
        _, args, _ = references[0]
        return [{"bytes": self.whole // args[1]}, None] if method == "export" else [[[-1.0]], [[-1.0]]]


class Replicas:
    """One replica, which says that it got so many bytes."""

    def __init__(self, got: int, seconds: float = 0.0):
        self.got = got
        self.seconds = seconds
        self.offers: list[dict[str, Any]] = []

    async def __call__(self, method: str, version: int, offer: dict[str, Any], only: Any) -> list[Any]:
        self.offers.append(offer)
        await asyncio.sleep(self.seconds)
        shown = {"replica_id": "r", "version": version, "max_logprob_diff": 0.0, "bytes": self.got}
        return [None, {**shown, "phases": {"apply": 0.0}}]


def transfer(replicas: Any, ranks: Any, name: str = "object", timeout: float = 5.0) -> Any:
    return transfer_of(name, replicas, ranks, 1e-4, timeout)


async def test_the_second_time_chunks_are_asked_for_in_order_before_the_canaries() -> None:
    whole = 3 * CHUNK_BYTES + 5
    ranks, replicas = Ranks(whole), Replicas(whole // 3 * 3)
    way = transfer(replicas, ranks)
    await way.send(1, MEMBERS)
    assert [method for method, _ in ranks.asked] == ["export", "logprobs"] and ranks.asked[0][1] == (0, 1, 0)
    ranks.asked.clear()
    await way.send(2, MEMBERS)
    assert [args for method, args in ranks.asked if method == "export"] == [(n, 3, whole // 3) for n in range(3)]
    assert ranks.asked[-1][0] == "logprobs"
    offer = replicas.offers[-1]
    assert [args for _, args, _ in offer["chunks"]] == [(n, 3, whole // 3) for n in range(3)]
    assert {rank for _, _, rank in offer["chunks"]} == {0} and len(offer["expected"]) == 1


async def test_there_are_not_too_many_chunks_and_an_adapter_is_one() -> None:
    whole = 100 * CHUNK_BYTES
    for name, chunks in (("object", MOST_CHUNKS), ("adapter", 1)):
        ranks = Ranks(whole)
        way = transfer(Replicas(whole), ranks, name)
        await way.send(1, MEMBERS)
        await way.send(2, MEMBERS)
        assert sum(method == "export" for method, _ in ranks.asked) == 1 + chunks


@pytest.mark.parametrize(("got", "difference"), [(1000, 0.0), (999, float("inf")), (1001, float("inf"))])
async def test_a_replica_that_got_other_bytes_proves_nothing(got: int, difference: float) -> None:
    [shown] = await transfer(Replicas(got), Ranks(1000)).send(1, MEMBERS)
    assert shown["max_logprob_diff"] == difference
    assert list(shown["phases"]) == ["call", "apply"] and shown["phases"]["call"] > 0


@pytest.mark.parametrize("method", ["export", "logprobs"])
async def test_a_rank_that_is_lost_is_told_at_once_and_not_the_replicas_trouble(method: str) -> None:
    with pytest.raises(TrainersLostError, match=f"died during '{method}'"):
        await transfer(Replicas(1000, seconds=60.0), Ranks(1000, lost=method)).send(1, MEMBERS)


async def test_a_replica_that_does_not_answer_is_waited_for_no_longer_than_told() -> None:
    with pytest.raises(TimeoutError):
        await transfer(Replicas(1000, seconds=60.0), Ranks(1000), timeout=0.05).send(1, MEMBERS)


def test_a_way_that_there_is_not_is_refused() -> None:
    with pytest.raises(InfrastructureError, match="no weight transfer 'pigeon'; known: object, adapter"):
        transfer(Replicas(0), Ranks(0), "pigeon")
    assert isinstance(transfer(Replicas(0), Ranks(0), "adapter"), ObjectTransfer)


def test_every_moment_belongs_to_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 7.5])
    monkeypatch.setattr("lightning_ray.policy.phases.time.perf_counter", partial(next, now))
    phases = Phases()
    for name in ("fetch", "apply", "fetch", "apply"):
        phases.end(name)
    assert phases.seconds == {"fetch": 1.5, "apply": 6.0}


# A GPU for both


@pytest.mark.parametrize(
    ("given", "chosen", "share"),
    [
        ({}, "object", 0.0),
        ({"device": "cuda"}, "nccl", 1.0),
        ({"device": "cuda", "share_gpu": True}, "ipc", 0.5),
        ({"device": "cuda", "share_gpu": True, "transfer": "object"}, "object", 0.5),
        ({"device": "cuda", "share_gpu": True, "adapter_rank": 4}, "adapter", 0.5),
    ],
)
def test_on_a_shared_gpu_memory_is_handed_over_in_place(given: dict[str, Any], chosen: str, share: float) -> None:
    settings = EngineSettings(**given)
    assert (settings.chosen_transfer, settings.gpu_share) == (chosen, share)
    options = policy_options(settings)
    assert options["ray_actor_options"].get("num_gpus", 0.0) == share
    variables = options["ray_actor_options"]["runtime_env"]["env_vars"]
    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in variables) == (settings.whole_transfer == "ipc")
    assert "TRITON_F32_DEFAULT" not in variables
    if settings.device == "cuda":
        exact = policy_options(settings.model_copy(update={"dtype": "float32"}))["ray_actor_options"]["runtime_env"]
        assert exact["env_vars"]["TRITON_F32_DEFAULT"] == "ieee"
    ranks = GRPO(model="a/folder", ranks=1, engine=given | {"adapter_rank": 0}).update_settings(Path("a/folder"))
    assert ranks.gpu_share == share


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"share_gpu": True}, "share_gpu is for GPUs: set device='cuda'"),
        ({"transfer": "ipc"}, "set share_gpu=true, or transfer='nccl'"),
        ({"device": "cuda", "transfer": "ipc"}, "set share_gpu=true, or transfer='nccl'"),
        ({"device": "cuda", "share_gpu": True, "tensor_parallel": 2}, "it goes with tensor_parallel=1"),
        ({"device": "cuda", "share_gpu": True, "max_replicas": 3}, "a fixed number of replicas"),
        ({"device": "cuda", "share_gpu": True, "transfer": "nccl"}, "leave transfer at 'auto', or share_gpu out"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        build(EngineSettings, given, "engine")


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_said_what_to_set(backend: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.transfer='\w+' needs a CUDA GPU .*: set engine\.device='cpu'"):
        load_transfer(backend)


@pytest.mark.parametrize("given", [{"ranks": 2}, {"ranks": 1, "engine.replicas": 2}])
def test_a_gpu_is_shared_by_one_replica_and_one_rank(given: dict[str, Any]) -> None:
    engine = {"device": "cuda", "share_gpu": True, "replicas": given.get("engine.replicas", 1)}
    with pytest.raises(ConfigError, match=r"set ranks=1 \(not \d\) and engine\.replicas=1 \(not \d\)"):
        GRPO(model="a/folder", ranks=given["ranks"], engine=engine)


def test_a_gpu_is_not_shared_by_several_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ray.algorithms.weights.check_model_folder", lambda folder: None)
    policies = {name: Policy(model="a/folder", agents=name) for name in ("writer", "checker")}
    settings = GRPO(ranks=1, engine={"device": "cuda", "share_gpu": True}, policies=policies)
    with pytest.raises(ConfigError, match=r"engine\.share_gpu=true .* of several policies: leave it out"):
        settings.check(SimpleNamespace(cluster=SimpleNamespace(owned=False), train_dataset=[0]))  # type: ignore[arg-type]


class Weights:
    """One tensor, gathered from all ranks."""

    settings: Any = SimpleNamespace(dtype="float32")

    def __init__(self) -> None:
        self.gathered = 0

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.gathered += 1
        yield "w", torch.zeros(2, 3)

    named_adapter = named_weights


@pytest.mark.parametrize(("backend", "ends"), [("ipc", [0, 1]), ("gloo", [0])])
def test_by_ipc_each_rank_has_an_end_and_else_the_first_alone(
    monkeypatch: pytest.MonkeyPatch, backend: str, ends: list[int]
) -> None:
    """vLLM's engines are not made: on CPU it is told which are asked for, and who sends."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    made, sent = [], []

    class End:
        def __init__(self, info: Any):
            self.info = info

        def send_weights(self) -> None:
            sent.append(self.info.rank)

    def trainer_init(info: Any, **rest: Any) -> End:
        made.append(info)
        return End(info)

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    if backend == "ipc":
        monkeypatch.setattr("lightning_ray.policy.publish.load_transfer", lambda name: IPCTrainerInitInfo)
    for rank in range(2):
        weights = Weights()
        publisher = WeightPublisher(weights, rank, backend)
        publisher.connect(lambda *call: [], {"r": 1}, 2, "127.0.0.1")
        publisher.push(1)
        assert weights.gathered == (1 if rank in ends else 2), "each rank takes part in gathering"
    assert [info.rank for info in made] == ends and sent == ends
    if backend == "ipc":
        assert all(info.packed and info.packed_buffer_size_bytes == BUFFER_BYTES for info in made)


class Large(Weights):
    """A tensor larger than a buffer is meant to be, without its memory."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.gathered += 1
        yield "small", torch.zeros(3)
        yield "large", torch.empty(BUFFER_BYTES, 2, device="meta", dtype=torch.bfloat16)


def test_by_ipc_a_buffer_holds_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    made: list[Any] = []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda info, **rest: made.append(info))
    monkeypatch.setattr("lightning_ray.policy.publish.load_transfer", lambda name: IPCTrainerInitInfo)
    WeightPublisher(Large(), 0, "ipc").connect(lambda *call: [], {"r": 1}, 2, "127.0.0.1")
    assert made[0].packed_buffer_size_bytes == BUFFER_BYTES * 2 * 2


class Several(Weights):
    """Tensors of which it is told how many were gathered."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(4):
            self.gathered += 1
            yield f"w{index}", torch.zeros(2, 3)


@pytest.mark.parametrize("sent", [0, 2, 4])
def test_a_push_that_breaks_off_takes_part_in_gathering_to_the_end(sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the other ranks would wait in the middle of it, and the next push would meet them there."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Breaks:
        def __init__(self, source: Any):
            self.source = source

        def send_weights(self) -> None:
            if sent:
                for _, _ in zip(range(sent), self.source, strict=False):
                    pass
            raise RuntimeError("a replica died")

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda info, client, source: Breaks(source))
    weights = Several()
    publisher = WeightPublisher(weights, 0, "gloo")
    publisher.connect(lambda *call: [], {"r": 1}, 2, "127.0.0.1")
    weights.gathered = 0
    with pytest.raises(RuntimeError, match="a replica died"):
        publisher.push(1, [[1, 2]])
    assert weights.gathered == 4
