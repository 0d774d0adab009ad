"""Decorators that put what is attached to an algorithm into its coroutine methods. Names as in Agent Lightning 0.3."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.base import NotAttachedError

if TYPE_CHECKING:
    from lightning_ray.algorithms.base import Algorithm

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
