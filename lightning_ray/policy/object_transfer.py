"""vLLM's weight transfer from memory: bytes that came by the object store, without a group of processes.

A replica fetches the weights once and ``lend``s them to its engine: to one in the same process as they are, to one in
another process of the machine as a file in memory. Reload and checks are vLLM's own; its name is ``object``.
"""

from __future__ import annotations

import itertools
import mmap
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from lightning_ray.errors import InfrastructureError
from lightning_ray.policy.flat_weights import Layout, as_tensors, split
from lightning_ray.policy.gloo_transfer import repack_embeddings

BACKEND = "object"
_lent: dict[str, Sequence[np.ndarray]] = {}
_numbers = itertools.count()


@contextmanager
def lend(parts: Sequence[np.ndarray], same_process: bool) -> Iterator[str]:
    """A name under which the engine's workers find the weights."""
    if same_process:
        name = f"lent-{next(_numbers)}"
        _lent[name] = parts
        try:
            yield name
        finally:
            del _lent[name]
        return
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(prefix="lightning-ray-", dir=memory) as file:
        for part in parts:
            file.write(part.data)
        file.flush()
        yield file.name


@contextmanager
def borrowed(name: str, layout: Layout) -> Iterator[Sequence[np.ndarray]]:
    """The weights of that name. Raises InfrastructureError on a node where they were not lent."""
    if name in _lent:
        yield _lent[name]
        return
    if not Path(name).exists():
        raise InfrastructureError(
            f"the weights lent as {name} are not on {platform.node()}, where a worker of the replica is: keep its "
            "workers on one node, or send whole weights by engine.transfer='nccl'"
        )
    if not layout:  # an empty file cannot be mapped
        yield []
        return
    with Path(name).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    yield split(np.frombuffer(memory, np.uint8), layout)  # unmapped with the last array over it


@dataclass
class ObjectInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed upon before."""


@dataclass
class ObjectUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are, and which."""

    name: str
    layout: Layout


class ObjectWeightTransferEngine(NCCLWeightTransferEngine):
    """Worker side: loads the tensors of a buffer in checkpoint format."""

    init_info_cls = ObjectInitInfo  # type: ignore[assignment]
    update_info_cls = ObjectUpdateInfo  # type: ignore[assignment]

    def init_transfer_engine(self, init_info: ObjectInitInfo) -> None:  # type: ignore[override]
        """Nothing to join."""

    def receive_weights(self, update_info: ObjectUpdateInfo) -> None:  # type: ignore[override]
        """Hand every tensor to the model's own loader, which copies it."""
        with borrowed(update_info.name, update_info.layout) as parts:
            self.model.load_weights(list(as_tensors(parts, update_info.layout)))

    def finish_weight_update(self) -> None:
        """Finalize the layerwise reload, then repack every matrix that the reload left behind."""
        super().finish_weight_update()
        repack_embeddings(self.model)


def register() -> None:
    """Make ``object`` known to this process's vLLM; harmless when repeated."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectWeightTransferEngine)
