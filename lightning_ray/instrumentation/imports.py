"""What is to be done with a module once somebody imports it: a client that no agent uses then costs no time at all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> Callable[[], None]:
    """Do something with the module of that name: now if it is imported, otherwise right after it is. What is returned
    calls it off.
    """
    finder = _Finder(name, action)
    sys.meta_path = [finder, *sys.meta_path]  # another list, as another thread may be going through this one
    if name in sys.modules:
        finder.act(importlib.import_module(name))  # which waits for a thread that is amid importing it
    return finder.call_off


class _Finder(MetaPathFinder):
    """Finds one module as Python does, and no other."""

    def __init__(self, name: str, action: Action):
        self._name = name
        self._action = action
        self._is_off = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._is_off:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec

    def act(self, module: ModuleType) -> None:
        """Do it, unless it was done or called off."""
        if not self._is_off:
            self.call_off()
            self._action(module)

    def call_off(self) -> None:
        """Look no more."""
        self._is_off = True
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
