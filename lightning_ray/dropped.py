"""Clients that are dropped unclosed, and whose connections they close.

When asyncio's transport of a connection is collected, it closes its socket and keeps the socket's number. OpenAI's and
Anthropic's clients, dropped unclosed, close their connections too, by tasks that their finalizers make in whatever
event loop runs in the thread that collects them. By then another connection may have that number, and it is that one
whose reader is removed: it hears nothing any more, be it an agent's call or the line to the span store. uvloop keeps a
socket open until its transport is closed.
"""

from __future__ import annotations

from asyncio import selector_events
from typing import Any

NO_SOCKET = 2**31 - 1
"""A number that no socket has, and that can be looked for: -1 is refused by selectors."""


def forget_collected() -> None:
    """From here on, in this process, a collected transport has no number to be closed by; once is enough."""
    transport: Any = selector_events._SelectorTransport  # type: ignore[attr-defined]
    collected = transport.__del__
    if getattr(collected, "forgets", False):
        return

    def __del__(self: Any) -> None:
        try:
            collected(self)
        finally:
            self._sock_fd = NO_SOCKET

    __del__.forgets = True  # type: ignore[attr-defined]
    transport.__del__ = __del__
