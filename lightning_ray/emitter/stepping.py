"""Await something with its steps run in another context than the one that awaits."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from contextvars import Context
from typing import Any, TypeVar

R = TypeVar("R")


def in_context(context: Context, awaitable: Awaitable[R]) -> Awaitable[R]:
    """``awaitable``, whose code sees and sets the variables of ``context``."""
    return _Stepped(context, awaitable)


class _Stepped(Awaitable[R]):
    def __init__(self, context: Context, awaitable: Awaitable[R]):
        self._context = context
        self._awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, R]:
        steps = self._awaitable.__await__()
        step, given = steps.__next__, ()
        while True:
            try:
                waited_for = self._context.run(step, *given)
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield waited_for
            except BaseException as error:
                step, given = steps.throw, (error,)  # type: ignore[attr-defined,assignment]
            else:
                step, given = (steps.__next__, ()) if sent is None else (steps.send, (sent,))  # type: ignore[attr-defined,assignment]
