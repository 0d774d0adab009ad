"""Trying out an agent on a few tasks in this process: no Ray, no GPU, any endpoint; breakpoints work.

``Trainer.dev`` is the way in. An algorithm (by default the Baseline) queues the tasks in a store, one runner plays
them, and a table tells what came of them.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.agent import FunctionalLitAgent, LitAgent, name_of
from lightning_ray.algorithms.base import Algorithm
from lightning_ray.algorithms.fast import Baseline, FastAlgorithm
from lightning_ray.algorithms.over_store import StoreOfLoop, attach, run_algorithm
from lightning_ray.emitter import find_final_reward
from lightning_ray.errors import ConfigError
from lightning_ray.span import Span
from lightning_ray.stepper import LitAgentRunner
from lightning_ray.store.base import Store
from lightning_ray.types import Dataset, Rollout

if TYPE_CHECKING:
    from lightning_ray.trainer import Trainer

TASKS = 10
"""Tasks of each data set that are tried unless told otherwise."""
LEASE_SECONDS = 7 * 86400.0
"""Nothing takes a rollout back from someone who sits at a breakpoint."""
POLL_SECONDS = 0.2


class NotFastError(ConfigError, TypeError):
    """An algorithm that needs more than this process."""


@dataclass(frozen=True)
class DevRollout:
    """One rollout as it ended, with its spans in order of arrival."""

    rollout: Rollout
    spans: list[Span]

    @property
    def reward(self) -> float | None:
        """The last primary reward."""
        return find_final_reward(self.spans)

    @property
    def error(self) -> str | None:
        """Why it failed."""
        failure = (self.rollout.metadata or {}).get("failure") or {}
        return failure.get("reason") if self.rollout.status == "failed" else None

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        return None if self.rollout.end_time is None else self.rollout.end_time - self.rollout.start_time


class FirstOf(Sequence[Any]):
    """The first tasks of a data set."""

    def __init__(self, dataset: Dataset[Any], count: int):
        self._dataset = dataset
        self._count = min(count, len(dataset))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._dataset[index % self._count]


def dev_algorithm(algorithm: Algorithm | None) -> FastAlgorithm:
    """The algorithm to try out with. Raises NotFastError for one that is not a FastAlgorithm."""
    if algorithm is None:
        return Baseline(polling_interval=POLL_SECONDS)
    if not isinstance(algorithm, FastAlgorithm):
        raise NotFastError(
            f"dev() plays with a FastAlgorithm, by default Baseline(); this trainer's algorithm is "
            f"{type(algorithm).__name__}: leave algorithm= out for dev(), or train with fit()"
        )
    return algorithm


def check_resources(agent: LitAgent[Any], trainer: Trainer) -> None:
    """Raises ConfigError for an agent made of a function whose resources nobody gave."""
    if not isinstance(agent, FunctionalLitAgent):
        return
    given = (trainer.initial_resources or {}).values()
    for parameter, kind in agent.needs.items():
        if not any(isinstance(resource, kind) for resource in given) and trainer.store is None:
            raise ConfigError(
                f"agent {name_of(agent)!r} has a parameter {parameter!r}, and there is no {kind.__name__}; give one: "
                'Trainer(initial_resources={"main_llm": lr.LLM(endpoint=..., model=..., api_key=...)})'
            )


async def develop(
    trainer: Trainer,
    agent: LitAgent[Any],
    datasets: Sequence[Dataset[Any] | None],
    folder: Path | None,
) -> list[DevRollout]:
    """Play; returns the rollouts in order of creation."""
    algorithm = dev_algorithm(trainer.algorithm)
    async with AsyncExitStack() as stack:
        store = trainer.store if trainer.store is not None else await local_store(stack, folder)
        before = {rollout.rollout_id for rollout in await store.query_rollouts()}
        agent.set_trainer(trainer)
        attach(algorithm, trainer)
        algorithm.set_store(StoreOfLoop(store, asyncio.get_running_loop()))
        runner: LitAgentRunner[Any] = LitAgentRunner(trainer.tracer, trainer.max_rollouts, poll_interval=POLL_SECONDS)

        async def learn() -> None:
            await run_algorithm(algorithm, *datasets)
            queued = [each.rollout_id for each in await store.query_rollouts() if each.rollout_id not in before]
            await store.wait_for_rollouts(rollout_ids=queued)

        with runner.run_context(agent=agent, store=store, hooks=trainer.hooks):
            playing = asyncio.create_task(runner.iter())
            learning = asyncio.create_task(learn())
            try:
                await asyncio.wait({playing, learning}, return_when=asyncio.FIRST_COMPLETED)
                for task in (playing, learning):
                    if task.done():
                        task.result()
            finally:
                for task in (playing, learning):
                    task.cancel()
                await asyncio.gather(playing, learning, return_exceptions=True)
        rollouts = [rollout for rollout in await store.query_rollouts() if rollout.rollout_id not in before]
        return [DevRollout(each, (await store.query_spans(each.rollout_id)).items) for each in rollouts]


async def local_store(stack: AsyncExitStack, folder: Path | None) -> Store:
    """A store of this process: in the folder, or in one that is gone afterwards."""
    from lightning_ray.store.client import LocalStoreClient
    from lightning_ray.store.core import SpanStore

    if folder is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lightning-ray-dev-")))
    client = LocalStoreClient(SpanStore(folder, fsync="none", lease_seconds=LEASE_SECONDS))
    stack.push_async_callback(client.close)
    return client


def show(played: Sequence[DevRollout], console: Any = None) -> None:
    """Print a line for each rollout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{len(played)} rollouts", title_justify="left")
    for column, justify in (("mode", "left"), ("task", "left"), ("status", "left"), ("reward", "right")):
        table.add_column(column, justify=justify, max_width=50)  # type: ignore[arg-type]
    for column in ("spans", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("error", max_width=60)
    for one in played:
        rollout = one.rollout
        reward = "-" if one.reward is None else f"{one.reward:.4g}"
        seconds = "-" if one.seconds is None else f"{one.seconds:.2f}"
        cells = [rollout.mode or "-", str(rollout.input), rollout.status, reward, str(len(one.spans)), seconds]
        table.add_row(*(escape(" ".join(cell.split())[:200]) for cell in [*cells, one.error or ""]))
    (console or Console()).print(table)
