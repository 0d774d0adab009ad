"""vLLM's weight transfer over gloo: the CPU stands in for NCCL on the very same code path.

Both ends derive from vLLM's NCCL engines and change the transport alone: handshake, four-phase
update, layerwise reload and metadata checks stay vLLM's. Registered under the name ``gloo``. Every collective has a
deadline.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

BACKEND = "gloo"
DEADLINE = timedelta(seconds=60)
PACKED_BYTES = 256 * 2**20


class GlooGroup:
    """A process group beside torch's global one: rank 0 is the trainer, the others are engine workers."""

    def __init__(self, address: str, port: int, rank: int, world_size: int):
        store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=DEADLINE)
        self._group = dist.ProcessGroupGloo(store, rank, world_size, DEADLINE)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send from (or receive into) ``tensor``, source rank 0; returns when it is done."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """The group that an engine worker joins. ``rank_offset`` is the group rank of the replica's first worker."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """Worker side. Receives chunks of packed bytes and loads them in checkpoint format."""

    init_info_cls = GlooInitInfo  # type: ignore[assignment]

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:  # type: ignore[override]
        """Join the trainer's group."""
        worker = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        self.model_update_group = GlooGroup(
            init_info.master_address, init_info.master_port, init_info.rank_offset + worker, init_info.world_size
        )

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive every chunk and hand its tensors to the model's own loader."""
        metas = [
            ParamMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        for chunk in chunks(metas):
            sizes = [nbytes(meta) for meta in chunk]
            packed = torch.empty(sum(sizes), dtype=torch.uint8)
            self.model_update_group.broadcast(packed)
            self.model.load_weights(
                unpack_tensor(
                    packed,
                    [meta.name for meta in chunk],
                    [list(meta.shape) for meta in chunk],
                    [meta.dtype for meta in chunk],
                    sizes,
                )
            )

    def finish_weight_update(self) -> None:
        """Finalize the layerwise reload, then repack every matrix that the reload left behind."""
        super().finish_weight_update()
        repack_embeddings(self.model)


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Trainer side: where the group meets; its size is 1 + all engine workers."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """Trainer side. ``send_weights`` is vLLM's; only the broadcast underneath is gloo's."""

    init_info_cls = GlooTrainerInitInfo  # type: ignore[assignment]

    @classmethod
    def trainer_init(  # type: ignore[override]
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooTrainerWeightTransferEngine:
        """Open the group as rank 0 while the workers join it."""
        assert source is not None
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            payload = asdict(
                GlooInitInfo(
                    master_address=init_info.master_address,
                    master_port=init_info.master_port,
                    rank_offset=1,
                    world_size=init_info.world_size,
                )
            )
            with ThreadPoolExecutor(max_workers=1) as pool:
                joined = pool.submit(client.init_weight_transfer_engine, payload)
                engine.model_update_group = GlooGroup(
                    init_info.master_address, init_info.master_port, 0, init_info.world_size
                )
                joined.result(DEADLINE.total_seconds())
        return engine

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        if not self.is_sender:
            for _ in source:
                pass
            return
        pairs = self._checked_iter(source, meta)
        for chunk in chunks(meta):
            packed = pack_tensors((next(pairs) for _ in chunk), lambda item: item[1], buffer_size_bytes=2**62)
            assert packed is not None
            self.model_update_group.broadcast(packed.packed_tensor)
        next(pairs, None)  # lets the check see the end of the stream


def nbytes(meta: ParamMeta) -> int:
    """Bytes of one parameter on the wire."""
    return int(torch.Size(meta.shape).numel()) * meta.dtype.itemsize


def chunks(metas: list[ParamMeta]) -> list[list[ParamMeta]]:
    """Cut the parameters into runs of at most PACKED_BYTES (or one parameter); both ends cut alike."""
    result: list[list[ParamMeta]] = []
    size = 0
    for meta in metas:
        if not result or size + nbytes(meta) > PACKED_BYTES:
            result.append([])
            size = 0
        result[-1].append(meta)
        size += nbytes(meta)
    return result


def repack_embeddings(model: torch.nn.Module) -> None:
    """Rebuild the packed CPU form of matrices whose weight is kept beside it.

    vLLM packs each linear weight once for its CPU kernels. With tied embeddings the head loads nothing of its own, so
    a reload updates the shared weight and leaves the head's packed copy of the old one (seen in 0.30 and 0.32).
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]


def register() -> None:
    """Make ``gloo`` known to this process's vLLM; harmless when repeated."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainerWeightTransferEngine)
