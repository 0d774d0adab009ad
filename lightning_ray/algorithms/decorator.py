"""``@algo``: an algorithm made of one function, whose parameters say what it works with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from lightning_ray.algorithms.base import Algorithm
from lightning_ray.types import Dataset


class FunctionalAlgorithm(Algorithm):
    """Calls the function with those of these that it has as parameters: ``store``, ``train_dataset``, ``val_dataset``,
    ``llm_proxy``, ``adapter``, ``initial_resources``.
    """

    def __init__(self, algorithm_func: Callable[..., Any]) -> None:
        functools.update_wrapper(self, algorithm_func)
        self.function = algorithm_func
        self._parameters = inspect.signature(algorithm_func).parameters

    def is_async(self) -> bool:
        """Whether the function is a coroutine function."""
        return inspect.iscoroutinefunction(self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Call the function. Raises TypeError for a data set that it has no parameter for."""
        given: dict[str, Callable[[], Any]] = {
            "store": self.get_store,
            "adapter": self.get_adapter,
            "llm_proxy": self.get_llm_proxy,
            "initial_resources": self.get_initial_resources,
        }
        arguments = {name: get() for name, get in given.items() if name in self._parameters}
        for name, dataset in (("train_dataset", train_dataset), ("val_dataset", val_dataset)):
            if name in self._parameters:
                arguments[name] = dataset
            elif dataset is not None:
                raise TypeError(f"algorithm {self.__name__!r} has no parameter {name!r}, and there is a {name}")
        return self.function(**arguments)

    __name__: str


def algo(func: Callable[..., Any]) -> FunctionalAlgorithm:
    """Make an algorithm of a function, async or not."""
    return FunctionalAlgorithm(func)
