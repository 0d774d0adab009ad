"""Two processes that serve all policy tests as rank 0 and 1, or rank 0 alone, and what the tests have in common."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lightning_ray.policy.settings import UpdateSettings
from tests.policy import worker

DEADLINE = 60.0


class Ranks:
    """Updaters in processes of their own, called alike."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._processes = [ProcessPoolExecutor(1, mp_context=spawn, initializer=worker.start) for _ in range(2)]
        self.world_size = 0

    def build(self, settings: UpdateSettings, world_size: int = 1) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.world_size = world_size
        self._each(lambda rank: (worker.build, settings, rank, world_size, port))
        return self

    def call(self, method: str, *args: Any) -> Any:
        """Call every rank; their results must be the same."""
        return self._same(worker.call, method, *args)

    def weights(self) -> dict[str, np.ndarray]:
        return self._same(worker.weights)

    def adapter(self) -> dict[str, np.ndarray]:
        return self._same(worker.adapter)

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the first step since the updater was built, if it was not clipped."""
        return self._same(worker.gradients)

    def trained(self) -> list[str]:
        """Names of the parameters with a state of the optimizer."""
        return self._same(worker.trained)

    def _same(self, function: Callable[..., Any], *args: Any) -> Any:
        results = self._each(lambda rank: (function, *args))
        for other in results[1:]:
            np.testing.assert_equal(other, results[0])
        return results[0]

    def _each(self, submission: Callable[[int], tuple]) -> list[Any]:
        futures = [self._processes[rank].submit(*submission(rank)) for rank in range(self.world_size)]
        failures = [failure for future in futures if (failure := future.exception(DEADLINE))]
        if failures:
            raise failures[0]
        return [future.result() for future in futures]


@cache
def shared_ranks() -> Ranks:
    """The pair of processes; they end with this one."""
    return Ranks()


def settings_for(folder: Path, **changes: Any) -> UpdateSettings:
    defaults: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.01}
    return UpdateSettings(model_path=str(folder), **defaults | changes)


def assert_gradients(ranks: Ranks, model: torch.nn.Module) -> None:
    """The ranks' last ones are the model's."""
    gradients = ranks.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        assert gradients[name] == pytest.approx(parameter.grad.numpy(), abs=1e-4 * scale)


def assert_same_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=atol, err_msg=name)


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, table[name].type))
