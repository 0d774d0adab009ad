"""Trainer: what a user calls. Checks what it is given, makes the run, and lets the algorithm learn.

The same call works in a plain script, through ``lightning-ray train`` and inside a submitted Ray job.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from lightning_ray.agent import LitAgent
from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.errors import ConfigError
from lightning_ray.launch import current_launch
from lightning_ray.types import Dataset

T = TypeVar("T")


class Trainer:
    """Trains an agent with an algorithm.

    Args:
        algorithm: how to learn.
        n_runners: Ray actors that play rollouts.
        concurrency: rollouts that one runner plays at once.
        name: of the run; its folder is ``runs_dir/name``.
        runs_dir: where runs are kept.
        address: of a Ray cluster; by default RAY_ADDRESS, or a Ray of the run's own on this machine.
    """

    def __init__(
        self,
        *,
        algorithm: GRPO,
        n_runners: int = 2,
        concurrency: int = 64,
        name: str = "run",
        runs_dir: str | Path = "runs",
        address: str | None = None,
    ):
        launch = current_launch()
        if n_runners < 1 or concurrency < 1:
            raise ConfigError(f"n_runners={n_runners}, concurrency={concurrency}: both must be at least 1")
        self.algorithm = launch.apply(algorithm)
        self.n_runners = launch.setting("n_runners", n_runners)
        self.concurrency = launch.setting("concurrency", concurrency)
        self.folder = (Path(launch.runs_dir or runs_dir) / (launch.name or name)).absolute()
        self.address = address
        self.resume = launch.resume
        launch.refuse_leftovers()

    def fit(
        self,
        agent: LitAgent[T],
        train_dataset: Dataset[T],
        *,
        val_dataset: Dataset[T] | None = None,
        test_dataset: Dataset[T] | None = None,
    ) -> dict[str, Any]:
        """Train; returns what summary.json holds.

        ``val_dataset`` is played before, during and after the training, ``test_dataset`` before and after.
        Raises LightningRayError with a message that names the thing, its value and the fix; KeyboardInterrupt after
        an orderly end.
        """
        datasets: dict[str, Dataset[Any]] = {"train": train_dataset}
        for split, data in (("val", val_dataset), ("test", test_dataset)):
            if data is not None and len(data):
                datasets[split] = data
        with stoppable():
            return asyncio.run(self._fit(agent, datasets))

    async def _fit(self, agent: LitAgent[Any], datasets: dict[str, Dataset[Any]]) -> dict[str, Any]:
        from lightning_ray.cluster import Cluster, check_memory, check_port
        from lightning_ray.progress import Reporter
        from lightning_ray.run import Run
        from lightning_ray.run_folder import RunFolder, write_json

        if not isinstance(agent, LitAgent):
            raise ConfigError(
                f"agent is {type(agent).__name__} {agent!r:.60}; decorate the function with @lightning_ray.rollout, or "
                "subclass LitAgent"
            )
        folder = RunFolder(self.folder)
        run = Run(
            folder,
            Reporter(),
            Cluster(self.address),
            agent,
            datasets,
            self.n_runners,
            self.concurrency,
            self.resume,
        )
        self.algorithm.check(run)
        check_port(self.algorithm.engine)
        if run.cluster.owned:
            check_memory(self.algorithm.engine, self.algorithm.ranks)
        folder.create(self.resume)
        write_json(folder.path / "config.json", self.resolved())
        try:
            await self.algorithm.run(run)
        finally:
            await asyncio.shield(run.close())
        import json

        summary: dict[str, Any] = json.loads((folder.path / "summary.json").read_text())
        return summary

    def resolved(self) -> dict[str, Any]:
        """All settings, as config.json keeps them."""
        return {
            "algorithm": {"name": type(self.algorithm).__name__, **self.algorithm.model_dump(mode="python")},
            "n_runners": self.n_runners,
            "concurrency": self.concurrency,
            "address": self.address,
        }


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM (a stopped job) ends a run as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the owner of the signals decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
