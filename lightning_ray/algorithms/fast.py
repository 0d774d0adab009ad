"""Algorithms for the developer of an agent: they play, and show what happened. Names as in Agent Lightning 0.3."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_ray.algorithms.base import Algorithm, NotAttachedError
from lightning_ray.algorithms.injection import with_llm_proxy, with_store
from lightning_ray.errors import ConfigError
from lightning_ray.types import Dataset, Rollout, RolloutMode

if TYPE_CHECKING:
    from lightning_ray.span import Span
    from lightning_ray.store.base import Store

logger = logging.getLogger(__name__)
_QUEUED: Any = ["queuing", "requeuing"]


class FastAlgorithm(Algorithm):
    """One that ends soon: what ``Trainer.dev`` accepts."""


class Baseline(FastAlgorithm):
    """Plays every task of both data sets once in each epoch, and learns nothing.

    What came of each rollout (its spans, and what the adapter makes of them) is logged at INFO. A run's summary has the
    figures of both data sets: the mean reward with its interval, failures by kind, turns, tokens (``Evaluation``).

    Args:
        n_epochs: how often each data set is played.
        train_split: accepted as in Agent Lightning 0.3, between 0 and 1; which tasks are for training is told by the
            data sets.
        polling_interval: seconds after which to look again, if nothing was heard before.
        max_queue_length: rollouts that may wait for a runner before further ones are held back.
        span_verbosity: what is logged of each span: nothing, the keys of its attributes, or their values too.
    """

    def __init__(
        self,
        *,
        n_epochs: int = 1,
        train_split: float = 0.5,
        polling_interval: float = 5.0,
        max_queue_length: int = 4,
        span_verbosity: Literal["keys", "key_values", "none"] = "keys",
    ) -> None:
        if not 0.0 < train_split < 1.0:
            raise ConfigError(f"train_split={train_split}: give a number between 0 and 1, both excluded")
        if span_verbosity not in ("keys", "key_values", "none"):
            raise ConfigError(f"span_verbosity={span_verbosity!r}: give 'keys', 'key_values' or 'none'")
        self.n_epochs = n_epochs
        self.train_split = train_split
        self.polling_interval = polling_interval
        self.max_queue_length = max_queue_length
        self.span_verbosity = span_verbosity
        self._figures: dict[str, Any] = {}

    @with_llm_proxy()
    @with_store
    async def run(  # type: ignore[override]
        self,
        store: Store,
        llm_proxy: Any,
        train_dataset: Dataset[Any] | None = None,
        val_dataset: Dataset[Any] | None = None,
    ) -> None:
        """Play; ``store`` and ``llm_proxy`` are put in. Raises ConfigError if there is no task."""
        datasets: list[tuple[RolloutMode, Dataset[Any]]] = [("train", train_dataset or []), ("val", val_dataset or [])]
        tasks = [(mode, index, data[index]) for mode, data in datasets for index in range(len(data))]
        if not tasks:
            raise ConfigError(f"{type(self).__name__} has nothing to play: give a train_dataset or a val_dataset")
        resources_id = None
        if (resources := self.get_initial_resources()) is not None:
            resources_id = (await store.update_resources("default", resources)).resources_id
        played: dict[str, list[str]] = {}
        for epoch in range(self.n_epochs):
            logger.info("epoch %d of %d: %d tasks", epoch + 1, self.n_epochs, len(tasks))
            await self._play(store, tasks, resources_id, played)
        self._figures = {mode: await _figures(store, ids) for mode, ids in played.items()}

    def summary(self) -> dict[str, Any]:
        """The figures by data set."""
        return dict(self._figures)

    async def _play(
        self,
        store: Store,
        tasks: Sequence[tuple[RolloutMode, int, Any]],
        resources_id: str | None,
        played: dict[str, list[str]],
    ) -> None:
        watching: set[asyncio.Task[None]] = set()
        try:
            for mode, index, task in tasks:
                while (await store.query_rollouts(status_in=_QUEUED, limit=0)).total > self.max_queue_length:
                    if watching:
                        watching = await self._first_of(watching)
                    else:
                        await asyncio.sleep(self.polling_interval)
                rollout = await store.enqueue_rollout(task, mode, resources_id, metadata={"task": index})
                played.setdefault(mode, []).append(rollout.rollout_id)
                watching.add(asyncio.create_task(self._watch(store, rollout.rollout_id)))
            while watching:
                watching = await self._first_of(watching)
        finally:
            for task_of_ours in watching:
                task_of_ours.cancel()

    async def _first_of(self, watching: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Those still at work, after one has ended or a while has passed."""
        done, left = await asyncio.wait(watching, timeout=self.polling_interval, return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            ended.result()
        return left

    async def _watch(self, store: Store, rollout_id: str) -> None:
        while not (ended := await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=self.polling_interval)):
            pass
        await self._tell(store, ended[0])

    async def _tell(self, store: Store, rollout: Rollout) -> None:
        """Log what came of a rollout."""
        if not logger.isEnabledFor(logging.INFO):
            return
        seconds = (rollout.end_time or rollout.start_time) - rollout.start_time
        logger.info("rollout %s: %s after %.2f s", rollout.rollout_id, rollout.status, seconds)
        for attempt in await store.query_attempts(rollout.rollout_id):
            logger.info("  attempt %d, %s: %s", attempt.sequence_id, attempt.attempt_id, attempt.status)
        spans = (await store.query_spans(rollout.rollout_id, "latest")).items
        for span in spans if self.span_verbosity != "none" else ():
            logger.info("  span %s", self._described(span))
        try:
            adapter = self.get_adapter()
        except NotAttachedError:
            return
        logger.info("  adapted: %s", adapter.adapt(spans))

    def _described(self, span: Span) -> str:
        lasted = f"{span.end_time - span.start_time:.2f} s" if span.start_time and span.end_time else "no time"
        known = span.attributes if self.span_verbosity == "key_values" else list(span.attributes)
        return f"{span.sequence_id} {span.name} ({lasted}): {known}"


async def _figures(store: Store, rollout_ids: Sequence[str]) -> dict[str, Any]:
    from lightning_ray.evaluation.figures import figures_of
    from lightning_ray.evaluation.plays import read_plays

    return figures_of(await read_plays(store, rollout_ids)).as_dict()
