"""The base of algorithms of one's own that train weights: their settings, and the session that they get."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr

from lightning_ray.algorithms.injection import arguments_of
from lightning_ray.algorithms.weights import WeightAlgorithm
from lightning_ray.errors import ConfigError
from lightning_ray.policy.settings import LearningSettings
from lightning_ray.types import Dataset

if TYPE_CHECKING:
    from lightning_ray.algorithms.session import TrainingSession
    from lightning_ray.algorithms.source import Source
    from lightning_ray.run.phases import PhaseClock
    from lightning_ray.run.run import Run
    from lightning_ray.trajectories.account import Account
    from lightning_ray.trajectories.episode import Episode

OWN = "TrainingAlgorithm"
"""What config.json names as the ``base`` of such an algorithm."""


class TrainingAlgorithm(WeightAlgorithm, LearningSettings):
    """Override ``async def run(self, train_dataset, val_dataset)``, over ``self.get_session()``.

    Its fields, those of a subclass too, are settings: ``--set algorithm.NAME=VALUE`` reaches them.
    """

    learning_rate: float = Field(default=1e-6, gt=0)
    _session: TrainingSession | None = PrivateAttr(default=None)

    def get_session(self) -> TrainingSession:
        """What it trains with. Raises NotAttachedError outside of a run."""
        session: TrainingSession = self._attached(self._session, "session")
        return session

    def set_session(self, session: TrainingSession) -> None:
        """Attach what it trains with."""
        self._session = session

    def settings(self) -> dict[str, Any]:
        """The fields, and what it is."""
        return {**super().settings(), "base": OWN}

    def settle(self, episodes: Sequence[Episode], group_of: Mapping[str, str], oldest_version: int | None) -> Account:
        """Groups whose rewards differ, as ``batch`` has it."""
        from lightning_ray.trajectories.account import settle

        return settle(episodes, group_of, self.batch, oldest_version)

    def source(self, run: Run, clock: PhaseClock) -> Source:
        """It plays what it wants, by its session."""
        raise NotImplementedError(f"{type(self).__name__} plays by its session")

    def check(self, run: Run) -> None:
        """The model, the engine's port and the memory must be there, and a coroutine to run."""
        if not self.is_async():
            raise ConfigError(f"algorithm {type(self).__name__} trains weights and is not async: make it 'async def'")
        super().check(run)

    async def learn(self, run: Run) -> None:
        """Bring up the run, call ``run``, evaluate after it and write the summary."""
        from lightning_ray.algorithms.over_store import run_algorithm
        from lightning_ray.algorithms.session import TrainingSession

        session = TrainingSession(self, run)
        await run.start(self)
        session.begin()
        self.set_session(session)
        self.set_store(run.store)
        await run_algorithm(self, run.train_dataset if len(run.train_dataset) else None, run.datasets.get("val"))
        if run.folder.latest_checkpoint() is None or run.folder.read_state()["step"] < session.step:
            await session.save()
        await run.finish()


class FunctionalTrainingAlgorithm(TrainingAlgorithm):
    """One made of a function (``@algo(model=...)``), which gets what it has parameters for, ``session`` too."""

    function: ClassVar[Callable[..., Any]]

    def is_async(self) -> bool:
        """Whether the function is a coroutine function."""
        return inspect.iscoroutinefunction(type(self).function)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Call the function."""
        given = {"session": self.get_session}
        function = type(self).function
        answer: Awaitable[None] | None = function(**arguments_of(function, self, train_dataset, val_dataset, given))
        return answer
