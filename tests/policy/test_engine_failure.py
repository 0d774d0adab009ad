"""An engine in a process of its own that does not start: its own error is told, not that there was one."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightning_ray.policy.engine_failure import raised

LOG = """(EngineCore pid=896) Process EngineCore:
(EngineCore pid=896) Traceback (most recent call last):
(EngineCore pid=896)   File "core.py", line 1370, in run_engine_core
(EngineCore pid=896)     raise ValueError(
(EngineCore pid=896) ValueError: the KV cache (0.01 GiB) is too small
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above.
"""
REPLICA = """
from lightning_ray.config import EngineSettings
from lightning_ray.policy import engine_failure
import sys

print("(Worker_TP0 pid=7) torch.OutOfMemoryError: CUDA out of memory.", file=sys.stderr, flush=True)
try:
    with engine_failure.told(EngineSettings(max_model_len=512)):
        raise RuntimeError("Engine core initialization failed. See root cause above.")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_the_errors_of_an_engines_processes_are_the_cause() -> None:
    logged = "(Worker_TP0 pid=7) ERROR 11-28 20:22:31 [m.py:941] torch.OutOfMemoryError: CUDA out of memory.\n"
    came = "(EngineCore pid=8) Exception: WorkerProc initialization failed\n"
    assert raised(logged + came) == (
        "torch.OutOfMemoryError: CUDA out of memory.; then Exception: WorkerProc initialization failed"
    )
    assert raised(LOG) == "ValueError: the KV cache (0.01 GiB) is too small"
    assert raised("RuntimeError: something of the replica's own\n") is None
    assert raised("(EngineCore pid=8)     raise ValueError(") is None


def test_it_is_read_from_what_the_process_wrote(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        said = subprocess.run([sys.executable, "-c", REPLICA], stdout=subprocess.PIPE, stderr=log, timeout=60)
    assert said.stdout.decode().strip() == (
        "InfrastructureError: vLLM's engine did not start with engine.max_model_len=512, "
        "engine.kv_cache_memory_mb=128, engine.arguments={}: torch.OutOfMemoryError: CUDA out of memory."
    )


def test_without_a_file_to_read_the_error_is_told_as_it_is() -> None:
    said = subprocess.run([sys.executable, "-c", REPLICA], capture_output=True, text=True, timeout=60)
    assert said.stdout.strip().endswith(": RuntimeError: Engine core initialization failed. See root cause above.")


def test_an_engine_in_the_replicas_process_tells_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from lightning_ray.policy import engine_thread

    def too_small(**_: object) -> None:
        raise ValueError("the KV cache is too small")

    monkeypatch.setattr(engine_thread, "EngineCoreProc", too_small)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(ValueError, match="the KV cache is too small"), engine_thread.engine_on_a_thread():
        manager = engine_thread.engine_utils.CoreEngineProcManager(1, 0, 0, {}, True, "", None, False)  # type: ignore[arg-type]
        manager.monitor_engine_liveness()
        assert manager.finished_procs() == {"EngineCore": 1}
        raise RuntimeError("Engine core initialization failed. See root cause above.")
