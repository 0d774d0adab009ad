"""An algorithm over a store: what it works with is attached, and its ``run`` is called, async or not."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.base import Algorithm
from lightning_ray.placement.asks import Wanted
from lightning_ray.run.folder import write_json
from lightning_ray.store.base import Store
from lightning_ray.types import Dataset

if TYPE_CHECKING:
    from lightning_ray.run.run import Run
    from lightning_ray.trainer import Trainer


class StoreOfLoop(Store):
    """A store that belongs to one event loop, for callers in any thread and loop."""

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop):
        self._store = store
        self._loop = loop

    @property
    def capabilities(self) -> dict[str, bool]:
        """As the store's, and safe for threads."""
        return {**self._store.capabilities, "thread_safe": True}

    async def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        call = self._store._call(name, *args, timeout=timeout)
        if asyncio.get_running_loop() is self._loop:
            return await call
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))


def attach(algorithm: Algorithm, trainer: Trainer) -> None:
    """Give an algorithm what its trainer has. Its store is set where one is opened."""
    algorithm.set_trainer(trainer)
    algorithm.set_adapter(trainer.adapter)
    algorithm.set_llm_proxy(trainer.llm_proxy)
    if trainer.initial_resources is not None:
        algorithm.set_initial_resources(trainer.initial_resources)


async def run_algorithm(
    algorithm: Algorithm, train_dataset: Dataset[Any] | None, val_dataset: Dataset[Any] | None
) -> None:
    """Call ``run``; one that is not async in a thread, so that the runners go on meanwhile."""
    datasets = {"train_dataset": train_dataset, "val_dataset": val_dataset}
    if algorithm.is_async():
        answer: Any = algorithm.run(**datasets)
    else:
        answer = await asyncio.to_thread(algorithm.run, **datasets)
    if inspect.isawaitable(answer):
        await answer


async def learn_over_store(algorithm: Algorithm, run: Run) -> None:
    """Bring up the run's store and runners, and let the algorithm work with them; there is no policy to train.

    Raises InfrastructureError when runners die again and again.
    """
    with run.reporter.stage("Ray and span store"):
        wanted = Wanted(runners=run._runners.minimum, most_runners=run._runners.maximum)
        run.cluster.start_ray(wanted)
        await run.cluster.make_room(wanted, run.reporter.note, {})
        run.store = run.cluster.start_store(run.folder.store)
        await run.store.statistics()
        if relayed := await run.cluster.start_relay():
            algorithm.set_initial_resources({**(algorithm.get_initial_resources() or {}), **relayed})
        run.cluster.start_runners(run.agent, run._runners, run._hooks)
    algorithm.set_store(run.store)
    failure = run.cluster.failure
    assert failure is not None
    train = run.train_dataset if len(run.train_dataset) else None
    learning = asyncio.create_task(run_algorithm(algorithm, train, run.datasets.get("val")))
    try:
        await asyncio.wait({learning, failure}, return_when=asyncio.FIRST_COMPLETED)
        (learning if learning.done() else failure).result()
    finally:
        learning.cancel()
    known = await run.store.statistics()
    counts = {name: known[name] for name in ("rollouts", "rollouts_by_status", "spans")}
    write_json(run.folder.path / "summary.json", {**counts, "seconds": run.elapsed(), **algorithm.summary()})
    run.reporter.note(f"everything is in {run.folder.path}")
