"""The attempt goes along into threads: work given to a thread pool, and threads started, inside an attempt.

Threads have a context of their own, so what an agent emits in them would belong to no attempt. Daemon threads are left
alone, and so are a pool's own workers: they outlive the attempt that starts them and serve others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, thread
from typing import Any, TypeVar

from lightning_ray.tracing.attempt import carried, current_trace

R = TypeVar("R")
_POOL_WORKER = getattr(thread, "_worker", None)
"""What the threads of a ThreadPoolExecutor run."""


def carrying(function: Callable[..., R]) -> Callable[..., R]:
    """The function, run in the attempt and under the span at work here. Itself outside of an attempt."""
    trace = current_trace()
    if trace is None:
        return function
    from opentelemetry import context as otel

    here = otel.get_current()

    def carry(*args: Any, **kwargs: Any) -> R:
        token = otel.attach(here)
        try:
            with carried(trace):
                return function(*args, **kwargs)
        finally:
            otel.detach(token)

    return carry


def install() -> None:
    """Carry attempts into this process's threads from now on."""
    submit: Any = ThreadPoolExecutor.submit
    start = threading.Thread.start

    @functools.wraps(submit)
    def submit_carrying(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return submit(self, carrying(fn), *args, **kwargs)

    @functools.wraps(start)
    def start_carrying(self: threading.Thread) -> None:
        target = getattr(self, "_target", None)
        if not self.daemon and (target is None or target is not _POOL_WORKER):
            self.run = carrying(self.run)  # type: ignore[method-assign]
        start(self)

    ThreadPoolExecutor.submit = submit_carrying  # type: ignore[method-assign,assignment]
    threading.Thread.start = start_carrying  # type: ignore[method-assign]
