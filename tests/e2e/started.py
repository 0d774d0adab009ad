"""A run that is up and makes no steps by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.cluster import Cluster
from lightning_ray.config import RunnerSettings
from lightning_ray.progress import Reporter
from lightning_ray.run.folder import RunFolder
from lightning_ray.run.run import Run
from tests.e2e.tiny import two_turns


@asynccontextmanager
async def started(
    path: Path, settings: GRPO, tasks: list[dict[str, Any]], runners: RunnerSettings
) -> AsyncIterator[Run]:
    """One of the agent ``two_turns``, in a fresh folder; ended at the end."""
    folder = RunFolder(path)
    folder.create(resume=False)
    run = Run(folder, Reporter(Console(quiet=True)), Cluster(), two_turns, {"train": tasks}, runners, False)
    try:
        await run.start(settings)
        yield run
    finally:
        await run.close()
