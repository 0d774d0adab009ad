"""The policy on one rank, from a checkpoint of any number of ranks, under settings that may have changed since.

FSDP2 shards a tensor by rows: what the ranks saved of it, laid end to end, is the whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from lightning_ray.errors import ConfigError
from lightning_ray.policy.model_folder import PROGRESS, STATE, check_same_model, check_tokenizer
from lightning_ray.policy.update import PolicyUpdater


class ReplayUpdater(PolicyUpdater):
    """One rank that is all ranks."""

    def load(self, folder: str) -> None:
        """Go on where any number of ranks wrote the folder. Raises ConfigError if it cannot be read so."""
        progress = json.loads((Path(folder) / STATE / PROGRESS).read_text())
        if progress["world_size"] == 1:
            super().load(folder)
            return
        check_same_model(Path(folder), Path(self.settings.model_path))
        check_tokenizer(Path(folder), Path(self.settings.model_path))
        shards = Shards(Path(folder) / STATE, progress["world_size"])
        self._take_weights(shards.whole("model"))
        self._take_optimizer(shards.whole("optim"))
        self._engine.lr_scheduler.load_state_dict(shards.first("extra_state")["lr_scheduler"])
        self._engine.follow_settings()
        self.updates = int(progress["updates"])

    @torch.no_grad()
    def _take_weights(self, weights: dict[str, torch.Tensor]) -> None:
        own = self._engine.module.state_dict()
        for name, tensor in weights.items():
            _local(own[name]).copy_(tensor)

    def _take_optimizer(self, state: dict[str, Any]) -> None:
        """The optimizer numbers its weights; their state is sharded as they are, here over one rank."""
        weights = [weight for group in self._engine.optimizer.param_groups for weight in group["params"]]
        for number, values in state["state"].items():
            weight = weights[number]
            if isinstance(weight, DTensor):
                for name, tensor in values.items():
                    if tensor.shape == weight.shape:
                        local = tensor.to(weight.device)
                        values[name] = DTensor.from_local(local, weight.device_mesh, weight.placements)
        self._engine.optimizer.load_state_dict(state)


class Shards:
    """The files of a checkpoint's ranks."""

    def __init__(self, folder: Path, ranks: int):
        self._folder = folder
        self._ranks = ranks

    def first(self, name: str) -> Any:
        """What rank 0 saved under ``name``."""
        return self._read(name, 0)

    def whole(self, name: str) -> Any:
        """What the ranks saved under ``name``, with tensors put together."""
        return _together([self._read(name, rank) for rank in range(self._ranks)])

    def _read(self, name: str, rank: int) -> Any:
        file = self._folder / f"{name}_world_size_{self._ranks}_rank_{rank}.pt"
        if not file.is_file():
            raise ConfigError(f"{file} is missing: the checkpoint is not whole; replay a step before it is needed")
        return torch.load(file, map_location="cpu", weights_only=False)


def _together(parts: list[Any]) -> Any:
    """One value of the ranks' values."""
    first = parts[0]
    if isinstance(first, DTensor):
        [placement] = first.placements
        if not isinstance(placement, Shard):
            return _local(first)
        return torch.cat([_local(part) for part in parts], dim=placement.dim)
    if isinstance(first, dict):
        return {name: _together([part[name] for part in parts]) for name in first}
    return first


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
