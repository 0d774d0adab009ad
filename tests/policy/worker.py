"""What a rank's process does for the tests: hold one updater at a time and call it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import numpy as np
import torch

from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.update import PolicyUpdater

UPDATER: list[PolicyUpdater] = []


def start() -> None:
    """Begin a rank's process, which ends with the tests', however these end."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def build(settings: UpdateSettings, rank: int, world_size: int, port: int) -> None:
    """Replace the updater of this process."""
    UPDATER.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    UPDATER.append(PolicyUpdater(settings, rank, world_size, "127.0.0.1", port))


def call(method: str, *args: Any) -> Any:
    return getattr(UPDATER[0], method)(*args)


def weights() -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in UPDATER[0].named_weights()}


def adapter() -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in UPDATER[0].named_adapter()}


def gradients() -> dict[str, np.ndarray]:
    """Of the first step, by Hugging Face's names: Adam's first moment is then (1 - beta 1) times the gradient."""
    engine = UPDATER[0]._engine
    share = 1 - engine.optimizer.param_groups[0]["betas"][0]
    return {
        name: whole(engine.optimizer.state[weight]["exp_avg"]).numpy() / share
        for name, weight in engine.module.named_parameters()
        if weight in engine.optimizer.state
    }


def trained() -> list[str]:
    engine = UPDATER[0]._engine
    return [name for name, weight in engine.module.named_parameters() if weight in engine.optimizer.state]


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
