"""A Ray of a run's own on this machine, in a folder of its own: started, and ended with all that grew out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from lightning_ray.errors import ConfigError, InfrastructureError, last_line
from lightning_ray.machine import end_processes, environment, grown_from
from lightning_ray.scratch import Scratch

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 2**30
"""Room for the weights of a small model, twice; memory is taken as it is used."""
TRIES = 2
"""Starts: Ray gives its own processes thirty seconds, which a machine that stalls may take for nothing."""


class OwnRay:
    """See the module; ``path`` is the folder."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self.path = self._scratch.path
        self._grown: list[psutil.Process] = []

    @classmethod
    def start(cls, variables: Callable[[Path], Mapping[str, str | None]], options: Mapping[str, Any]) -> OwnRay:
        """Start one with ``ray.init``'s options, its processes in an environment with the variables for its folder.

        Raises InfrastructureError if Ray does not start, with nothing left running; ConfigError if this process has a
        Ray already.
        """
        check_apart()
        for left in reversed(range(TRIES)):
            own = cls()
            try:
                own._start(variables(own.path), options)
                return own
            except BaseException as error:
                own.end()
                if not (left and isinstance(error, InfrastructureError)):
                    raise
                logger.warning("%s It is started once more.", error)
        raise AssertionError

    def _start(self, variables: Mapping[str, str | None], options: Mapping[str, Any]) -> None:
        import ray

        files = self.path / "tmp"
        files.mkdir()
        with environment(variables):
            try:
                ray.init(
                    "local",
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    runtime_env={"env_vars": {"TMPDIR": str(files)}},
                    _temp_dir=str(self.path),
                    **options,
                )
            except Exception as error:
                raise InfrastructureError(
                    f"Ray did not start on this machine ({last_line(error)}): has it too much to do, or too little "
                    "memory or disk?"
                ) from error

    def remember(self) -> None:
        """Note what has grown out of it so far, as what is in between may go: ``end`` ends that too."""
        self._grown += grown_from(str(self.path))

    def end(self) -> None:
        """End it, and with it whatever it started; the folder goes too."""
        import ray

        self.remember()
        ray.shutdown()
        end_processes(self._grown)
        self._scratch.remove()


def check_apart() -> None:
    """Raises ConfigError if this process has a Ray already, which the end of a run would take away."""
    import ray

    if ray.is_initialized():
        raise ConfigError(
            "this process has called ray.init already, and a run starts or joins Ray by itself: call ray.shutdown() "
            "before it, and set RAY_ADDRESS or address= to the Ray that it is to join"
        )
