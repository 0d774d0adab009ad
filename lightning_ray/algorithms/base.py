"""What an algorithm is: something that learns from rollouts until it is done.

One that works over the store alone, as in Agent Lightning 0.3, overrides ``run(train_dataset, val_dataset)``. One that
trains weights does too, over a session (``own.TrainingAlgorithm``), or works with all that a run offers and overrides
``learn(run)``, as GRPO does. docs/algorithms.md shows both.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr, ValidationError

from lightning_ray.config import Settings, explain
from lightning_ray.errors import ConfigError, LightningRayError

if TYPE_CHECKING:
    from lightning_ray.adapters.base import TraceAdapter
    from lightning_ray.relay.settings import Upstream
    from lightning_ray.run.run import Run
    from lightning_ray.store.base import Store
    from lightning_ray.trainer import Trainer
    from lightning_ray.types import Dataset, NamedResources


class NotAttachedError(LightningRayError, ValueError):
    """An algorithm asked for something that nobody gave it."""


class Algorithm:
    """Base of all algorithms. What it works with is attached by the trainer, or by ``set_...`` where there is none."""

    _trainer_ref: weakref.ReferenceType[Trainer] | None = None
    _store: Store | None = None
    _adapter: TraceAdapter[Any] | None = None
    _llm_proxy: Any = None
    _initial_resources: NamedResources | None = None

    def is_async(self) -> bool:
        """Whether ``run`` is a coroutine function."""
        return inspect.iscoroutinefunction(self.run)

    def set_trainer(self, trainer: Trainer) -> None:
        """Attach the trainer; the algorithm does not keep it alive."""
        self._trainer_ref = weakref.ref(trainer)

    def get_trainer(self) -> Trainer:
        """The trainer. Raises NotAttachedError if there is none, or it is gone."""
        return self._attached(self._trainer_ref() if self._trainer_ref is not None else None, "trainer")

    def set_store(self, store: Store) -> None:
        """Attach the store."""
        self._store = store

    def get_store(self) -> Store:
        """The store. Raises NotAttachedError if there is none."""
        return self._attached(self._store, "store")

    def set_adapter(self, adapter: TraceAdapter[Any]) -> None:
        """Attach what turns spans into something to learn from."""
        self._adapter = adapter

    def get_adapter(self) -> TraceAdapter[Any]:
        """The adapter. Raises NotAttachedError if there is none."""
        return self._attached(self._adapter, "adapter")

    def set_llm_proxy(self, llm_proxy: Any) -> None:
        """Attach a proxy before the model, or None."""
        self._llm_proxy = llm_proxy

    def get_llm_proxy(self) -> Any:
        """The proxy, or None."""
        return self._llm_proxy

    def set_initial_resources(self, resources: NamedResources) -> None:
        """What the agents get before anything was learned."""
        self._initial_resources = resources

    def get_initial_resources(self) -> NamedResources | None:
        """The initial resources, or None."""
        return self._initial_resources

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Learn over ``get_store()``: enqueue rollouts, wait for them, read their spans. Async or not."""
        raise NotImplementedError(f"{type(self).__name__} does not define run(train_dataset, val_dataset)")

    def check(self, run: Run) -> None:
        """Refuse what cannot work (ConfigError) before anything is started."""

    async def learn(self, run: Run) -> None:
        """Learn. ``run`` offers the data, the store, the cluster and the reports; by default ``self.run`` gets what
        it needs of them.
        """
        from lightning_ray.algorithms.over_store import learn_over_store

        await learn_over_store(self, run)

    def settings(self) -> dict[str, Any]:
        """What the run's config.json keeps of it."""
        return {}

    def relays(self, given: Mapping[str, Upstream]) -> dict[str, Upstream]:
        """The endpoints that the run's relay is to reach, by the names under which agents find them: those that were
        given, and the algorithm's own. Raises ConfigError where both have a name.
        """
        return dict(given)

    def summary(self) -> dict[str, Any]:
        """What the run's summary.json keeps of what it found, beside the counts of rollouts."""
        return {}

    def _attached(self, value: Any, what: str) -> Any:
        if value is None:
            raise NotAttachedError(
                f"{type(self).__name__} has no {what}; a Trainer attaches one, or call set_{what}() before run()"
            )
        return value


class AlgorithmSettings(Settings, Algorithm):
    """An algorithm whose fields are its settings: ``--set algorithm.NAME=VALUE`` reaches them.

    Unknown or bad settings raise ConfigError.
    """

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), "algorithm")) from None
        self._given = values

    def __eq__(self, other: object) -> bool:
        """Whether all settings are the same, however they came about."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def given(self) -> dict[str, Any]:
        """The settings that were given, as they were; the others follow from them."""
        return dict(self._given)

    def settings(self) -> dict[str, Any]:
        """The fields."""
        return self.model_dump(mode="python")
