"""What an algorithm is: settings, and one coroutine that learns from rollouts until it is done."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lightning_ray.config import Settings, explain
from lightning_ray.errors import ConfigError

if TYPE_CHECKING:
    from lightning_ray.run import Run


class Algorithm(Settings):
    """Base of all algorithms. Unknown or bad settings raise ConfigError."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), "algorithm")) from None

    def check(self, run: Run) -> None:
        """Refuse what cannot work (ConfigError) before anything is started."""

    @abstractmethod
    async def run(self, run: Run) -> None:
        """Learn. The run offers the data, the store, the cluster and the reports."""
