"""``@algo``: an algorithm made of one function, whose parameters say what it works with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, overload

from lightning_ray.algorithms.base import Algorithm
from lightning_ray.algorithms.injection import arguments_of
from lightning_ray.types import Dataset

if TYPE_CHECKING:
    from lightning_ray.algorithms.own import FunctionalTrainingAlgorithm


class FunctionalAlgorithm(Algorithm):
    """Calls the function with those of these that it has as parameters: ``store``, ``train_dataset``, ``val_dataset``,
    ``llm_proxy``, ``adapter``, ``initial_resources``.
    """

    def __init__(self, algorithm_func: Callable[..., Any]) -> None:
        functools.update_wrapper(self, algorithm_func)
        self.function = algorithm_func

    def is_async(self) -> bool:
        """Whether the function is a coroutine function."""
        return inspect.iscoroutinefunction(self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Call the function. Raises TypeError for a data set that it has no parameter for."""
        return self.function(**arguments_of(self.function, self, train_dataset, val_dataset))

    __name__: str


@overload
def algo(func: Callable[..., Any]) -> FunctionalAlgorithm: ...


@overload
def algo(func: None = None, **settings: Any) -> Callable[[Callable[..., Any]], FunctionalTrainingAlgorithm]: ...


def algo(
    func: Callable[..., Any] | None = None, **settings: Any
) -> FunctionalAlgorithm | Callable[[Callable[..., Any]], FunctionalTrainingAlgorithm]:
    """Make an algorithm of a function.

    ``@algo`` works over the store alone, async or not. ``@algo(model=..., steps=..., ...)`` trains weights: the
    arguments are a TrainingAlgorithm's settings (ConfigError for bad ones), and the function, which is async, may have
    a parameter ``session``.
    """
    if func is not None:
        return FunctionalAlgorithm(func)

    def decorate(function: Callable[..., Any]) -> FunctionalTrainingAlgorithm:
        from lightning_ray.algorithms.own import FunctionalTrainingAlgorithm

        class Made(FunctionalTrainingAlgorithm):
            pass

        Made.function = staticmethod(function)  # type: ignore[assignment]
        Made.__name__ = Made.__qualname__ = function.__name__
        Made.__doc__ = function.__doc__
        return Made(**settings)

    return decorate
