"""The engine in the replica's process: vLLM's engine core on a thread, behind the sockets of a process of its own.

It saves the memory and the start of a second process; sampling then shares one interpreter with serving.
``AsyncLLM`` knows engine processes only, so the manager of those is replaced while one is made.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.utils import CoreEngineProcManager

END_SECONDS = 5.0
_failed: list[Exception] = []
"""What ended engines of this process."""


class EngineThread(CoreEngineProcManager):
    """Manages one engine core on a thread, as its base class does processes."""

    def __init__(
        self,
        local_engine_count: int,
        start_index: int,
        local_start_index: int,
        vllm_config: Any,
        local_client: bool,
        handshake_address: str,
        executor_class: Any,
        log_stats: bool,
        client_handshake_address: str | None = None,
        tensor_queue: Any = None,
    ):
        self.processes: list[Any] = []
        self.manager_stopped = threading.Event()
        self.failed_proc_name: str | None = None
        self._core: EngineCoreProc | None = None
        self._sentinel, self._end = os.pipe()
        """Readable once the engine has ended."""
        arguments = {
            "vllm_config": copy.deepcopy(vllm_config),  # a process would have its own, too
            "local_client": local_client,
            "handshake_address": handshake_address,
            "executor_class": executor_class,
            "log_stats": log_stats,
            "client_handshake_address": client_handshake_address,
            "tensor_queue": tensor_queue,
            "engine_index": start_index,
        }
        self._thread = threading.Thread(target=self._run, args=(arguments,), name="EngineCore", daemon=True)
        self._thread.start()

    def _run(self, arguments: dict[str, Any]) -> None:
        try:
            self._core = EngineCoreProc(**arguments)
            self._core.run_busy_loop()
        except SystemExit:
            pass
        except Exception as error:
            self.failed_proc_name = "EngineCore"
            _failed.append(error)
            if self._core is not None:
                self._core._send_engine_dead()
            raise
        finally:
            if self._core is not None:
                self._core.shutdown()
            os.close(self._end)

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine."""
        self.manager_stopped.set()
        if self._core is not None and self._thread.is_alive():
            self._core.shutdown_state = EngineShutdownState.REQUESTED
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
            self._thread.join(END_SECONDS if timeout is None else timeout)

    def monitor_engine_liveness(self) -> None:
        """Return once the engine has ended."""
        self._thread.join()
        self.shutdown()

    def sentinels(self) -> list[int]:
        """What can be polled for the engine's end."""
        return [self._sentinel]

    def finished_procs(self) -> dict[str, int]:
        """The engine, if it has ended."""
        return {} if self._thread.is_alive() else {"EngineCore": 1}


@contextlib.contextmanager
def engine_on_a_thread() -> Iterator[None]:
    """What is made within has its engine in this process; raises what the engine raised, if it does not start."""
    before = engine_utils.CoreEngineProcManager
    engine_utils.CoreEngineProcManager = EngineThread  # type: ignore[misc]
    _failed.clear()
    try:
        yield
    except RuntimeError:  # says only that it failed
        if not _failed:
            raise
        raise _failed.pop() from None
    finally:
        engine_utils.CoreEngineProcManager = before  # type: ignore[misc]
