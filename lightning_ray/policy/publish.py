"""The trainer's end of a weight swap: drives vLLM's weight transfer from rank 0 into every replica at once.

The other ranks only take part in gathering the shards. What the replicas then compute with is not this module's
word to give: that is the proof's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from lightning_ray.errors import ConfigError
from lightning_ray.net import RANK_RANGE, free_port
from lightning_ray.policy.bits import bit_sum
from lightning_ray.policy.flat_weights import as_bytes, cut
from lightning_ray.policy.settings import UpdateSettings

BUFFER_BYTES = 256 * 2**20
Named = Iterator[tuple[str, torch.Tensor]]
Broadcast = Callable[..., list[Any]]
"""Calls a control method, with its arguments, on every replica and returns their answers; raises past its deadline."""


class Weights(Protocol):
    """What can be published: full tensors by name. Iterating is a collective over all ranks."""

    settings: UpdateSettings

    def named_weights(self) -> Named: ...

    def named_adapter(self) -> Named: ...


class ReplicaClient:
    """vLLM's control-plane client, answered by all replicas of a deployment."""

    def __init__(self, broadcast: Broadcast, offsets: dict[str, int]):
        self._broadcast = broadcast
        self._offsets = offsets
        self.version = 0
        self.canaries: list[list[int]] | None = None

    def _everywhere(self, method: str, *args: Any) -> None:
        answered = set(self._broadcast(method, *args))
        if answered != set(self._offsets):
            raise RuntimeError(
                f"the replicas changed during a weight swap: {method} was answered by {sorted(answered)}, "
                f"the transfer group has {sorted(self._offsets)}"
            )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every replica join the transfer group under its own ranks."""
        self._everywhere("connect", init_info, self._offsets)

    def start_weight_update(self) -> None:
        """Freeze generation and open the update."""
        self._everywhere("begin_swap")

    def update_weights(self, update_info: Any) -> None:
        """Have every replica receive; the trainer broadcasts meanwhile."""
        self._everywhere("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update under the version set on this client and resume, its canaries first."""
        self._everywhere("end_swap", self.version, self.canaries)


class WeightPublisher:
    """Pushes one rank's weights; made on every rank alike. ``connect`` and ``push`` are collectives."""

    def __init__(self, weights: Weights, rank: int, backend: str):
        self._weights = weights
        self._rank = rank
        self._backend = backend
        self._engine: Any = None
        self._client: ReplicaClient | None = None
        self._chunks: Iterator[list[tuple[str, torch.Tensor]]]
        self._pass: Named | None = None
        """What is being sent, once it was begun."""
        self._bits: dict[str, torch.Tensor] = {}
        """Of what rank 0 handed out last (``policy.bits``); nothing in float32."""

    def connect(self, broadcast: Broadcast, offsets: dict[str, int], world_size: int, address: str) -> None:
        """Form the transfer group of rank 0 and ``world_size - 1`` engine workers."""
        source = [
            (name, self._travels_in(tensor), tuple(tensor.shape)) for name, tensor in self._weights.named_weights()
        ]
        if not self._sends:
            return
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        init_info_of = load_transfer(self._backend)
        # Smaller than vLLM's own, for which an engine may have no room, but IPC refuses what does not fit into one.
        largest = max(math.prod(shape) * dtype.itemsize for _, dtype, shape in source)
        buffers = {"packed_buffer_size_bytes": max(BUFFER_BYTES, largest)}
        if self._backend == "ipc":
            init_info = init_info_of(rank=self._rank, packed=True, **buffers)
        else:
            port = free_port(address, RANK_RANGE)
            meeting = {"master_address": address, "master_port": port, "world_size": world_size, "rank": 0}
            init_info = init_info_of(**meeting, **(buffers if self._backend == "nccl" else {}))
        self._client = ReplicaClient(broadcast, offsets)
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = WeightTransferTrainerFactory.trainer_init(
            init_info, client=self._client, source=_source(self._begin_pass, source)
        )

    def _begin_pass(self) -> Named:
        self._pass = self._handed_out()
        return self._pass

    @property
    def _coarse(self) -> bool:
        """Whether the engine computes in bfloat16."""
        return self._weights.settings.dtype == "bfloat16"

    def _travels_in(self, tensor: torch.Tensor) -> torch.dtype:
        """Matrices travel in the engine's numbers: rounded before, half the bytes."""
        return torch.bfloat16 if self._coarse and tensor.ndim > 1 else tensor.dtype

    def _handed_out(self) -> Named:
        """The weights as they travel, their bits noted."""
        for name, tensor in self._weights.named_weights():
            if self._coarse and self._rank == 0:
                self._bits[name] = bit_sum(tensor.to(torch.bfloat16))
            yield name, tensor.to(self._travels_in(tensor))

    @property
    def _sends(self) -> bool:
        """Whether this rank has an end of the transfer: by IPC each has one, for the engine on its own GPU."""
        return self._rank == 0 or self._backend == "ipc"

    def export(self, chunk: int = 0, chunks: int = 1, size: int = 0) -> dict[str, Any] | None:
        """A chunk of the weights, or of their adapter, in the object store, from rank 0; the first one begins anew.

        All but the last have some ``size`` bytes. It has ``weights`` (a reference in a list, so that it is passed on as
        such), their ``layout`` and ``bytes``, and in bfloat16 their ``bits``; of an adapter ``adapter``, its rank and
        alpha. A collective, as the others.
        """
        adapter = self._backend == "adapter"
        if chunk == 0:
            tensors = self._weights.named_adapter() if adapter else self._handed_out()
            self._chunks = cut(tensors, chunks, size)
        part = next(self._chunks)
        if self._rank != 0:
            return None
        import ray

        parts, layout = as_bytes(part)
        offer = {"weights": [ray.put(parts)], "layout": layout, "bytes": sum(part.nbytes for part in parts)}
        if adapter:
            lora = self._weights.settings.lora
            return {**offer, "adapter": {"rank": lora.rank, "alpha": lora.alpha}}
        return {**offer, "bits": {name: int(self._bits[name]) for name, _ in part if name in self._bits}}

    def push(self, version: int, canaries: list[list[int]] | None = None) -> dict[str, int]:
        """Send the weights as ``version``, with canaries for the engines to run first.

        Returns their bits, from rank 0 and in bfloat16.
        """
        if not self._sends:
            _exhaust(self._handed_out())
        else:
            assert self._client is not None and self._engine is not None, "connect() comes before push()"
            self._client.version, self._client.canaries, self._pass = version, canaries, None
            try:
                self._engine.send_weights()
            except BaseException:
                with contextlib.suppress(Exception):  # the other ranks are gathering, or about to
                    _exhaust(self._handed_out() if self._pass is None else self._pass)
                raise
        return {name: int(bits) for name, bits in self._bits.items()}


def load_transfer(backend: str) -> Any:
    """Import vLLM's weight transfer of a backend; returns the class of its trainer-side init info."""
    if backend in ("object", "adapter"):
        return None
    if backend == "gloo":
        from lightning_ray.policy import gloo_transfer

        gloo_transfer.register()
        return gloo_transfer.GlooTrainerInitInfo
    if not torch.cuda.is_available():
        raise ConfigError(
            f"engine.transfer={backend!r} needs a CUDA GPU and a CUDA build of PyTorch; here is torch "
            f"{torch.__version__} and no GPU: set engine.device='cpu' and leave engine.transfer at 'auto', or give the "
            "trainer ranks GPUs"
        )
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo


def _exhaust(weights: Named) -> None:
    for _ in weights:
        pass


def _source(handed_out: Callable[[], Named], metas: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class UpdaterSource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*meta) for meta in metas]

        def __iter__(self) -> Named:
            return handed_out()

    return UpdaterSource()
