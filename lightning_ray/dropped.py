"""Connections whose owner was dropped unclosed, and what closes them afterwards.

When a transport of asyncio's is collected, it closes its socket and keeps the socket's number. SDK clients that are
dropped unclosed close their connections from their own finalizers, a moment later, and in whatever event loop runs in
the thread that collected them. By then another connection may have the number, and is the one that is closed to its
answer: it hears nothing any more, be it an agent's call or the line to the span store. uvloop goes by no numbers.
"""

from __future__ import annotations

from asyncio import selector_events
from typing import Any

NO_SOCKET = 2**31 - 1
"""A number that no socket has."""


def forget_collected() -> None:
    """From here on, in this process, a collected transport has no number to be closed by."""
    transport: Any = selector_events._SelectorTransport  # type: ignore[attr-defined]
    collected = transport.__del__
    if getattr(collected, "forgets", False):
        return

    def __del__(self: Any, *arguments: Any, **options: Any) -> None:
        self._sock_fd = NO_SOCKET
        collected(self, *arguments, **options)

    __del__.forgets = True  # type: ignore[attr-defined]
    transport.__del__ = __del__
