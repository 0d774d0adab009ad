"""What is attached to an algorithm, put into its coroutine methods and functions by name. Names as in Agent Lightning
0.3.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.base import NotAttachedError

if TYPE_CHECKING:
    from lightning_ray.algorithms.base import Algorithm
    from lightning_ray.types import Dataset

Method = Callable[..., Coroutine[Any, Any, Any]]


def with_store(func: Method) -> Method:
    """The method gets the store as its first argument; its callers leave it out."""

    @functools.wraps(func)
    async def with_it(self: Algorithm, *args: Any, **kwargs: Any) -> Any:
        return await func(self, self.get_store(), *args, **kwargs)

    return with_it


def with_llm_proxy(required: bool = False, auto_start: bool = True) -> Callable[[Method], Method]:
    """The method gets the proxy (or None) as its first argument; its callers leave it out.

    With ``auto_start`` a proxy that is not running runs for as long as the method does. With ``required`` the method
    raises NotAttachedError if there is no proxy.
    """

    def decorate(func: Method) -> Method:
        @functools.wraps(func)
        async def with_it(self: Algorithm, *args: Any, **kwargs: Any) -> Any:
            proxy = self.get_llm_proxy()
            if proxy is None and required:
                raise NotAttachedError(
                    f"{type(self).__name__} needs a proxy: Trainer(llm_proxy=...) or set_llm_proxy()"
                )
            starts = auto_start and proxy is not None and not proxy.is_running()
            if starts:
                await _done(proxy.start())
            try:
                return await func(self, proxy, *args, **kwargs)
            finally:
                if starts:
                    await _done(proxy.stop())

        return with_it

    return decorate


async def _done(answer: Any) -> None:
    if inspect.isawaitable(answer):
        await answer


def arguments_of(
    function: Callable[..., Any],
    algorithm: Algorithm,
    train_dataset: Dataset[Any] | None,
    val_dataset: Dataset[Any] | None,
    more: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """Those of these that the function has parameters for: ``store``, ``adapter``, ``llm_proxy``,
    ``initial_resources``, ``train_dataset``, ``val_dataset``, and ``more``.

    Raises TypeError for a data set that it has no parameter for.
    """
    parameters = inspect.signature(function).parameters
    given: dict[str, Callable[[], Any]] = {
        "store": algorithm.get_store,
        "adapter": algorithm.get_adapter,
        "llm_proxy": algorithm.get_llm_proxy,
        "initial_resources": algorithm.get_initial_resources,
        **(more or {}),
    }
    arguments = {name: get() for name, get in given.items() if name in parameters}
    for name, dataset in (("train_dataset", train_dataset), ("val_dataset", val_dataset)):
        if name in parameters:
            arguments[name] = dataset
        elif dataset is not None:
            called = getattr(function, "__name__", function)
            raise TypeError(f"algorithm {called!r} has no parameter {name!r}, and there is a {name}")
    return arguments
