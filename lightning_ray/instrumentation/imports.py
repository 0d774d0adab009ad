"""What is to be done with a module once somebody imports it: a client that no agent uses then costs no time at all."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import wrapt

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> Callable[[], None]:
    """Do something with the module of that name, once: now if it is imported, otherwise right after it is. What is
    returned calls it off.
    """
    waiting = [action]

    def act(module: ModuleType) -> None:
        while waiting:
            waiting.pop()(module)

    wrapt.register_post_import_hook(act, name)
    return waiting.clear
