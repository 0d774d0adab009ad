"""What a node says of a process that died there: the last lines of its log, its exit, the kernel's memory kills.

Asked of this node at once, of another by a task there; a node that is gone or silent is evidence too.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.deaths.exits import Exits
from lightning_ray.deaths.last_words import last_words

if TYPE_CHECKING:
    from lightning_ray.deaths.process import Process

LOG_BYTES = 8192
ANSWER_SECONDS = 10.0
"""For a task on another node: a worker may have to start there."""
KILLS = ((Path("/proc/vmstat"), "oom_kill"), (Path("/sys/fs/cgroup/memory.events"), "oom_kill"))
"""Where Linux counts them: of the machine, and of a container."""

exits = Exits()
"""Of this machine's processes."""


@dataclass(frozen=True)
class Evidence:
    """What could be learned."""

    exit: str | None = None
    """``killed by SIGKILL``."""
    words: str = ""
    """The last lines of its log, in one."""
    memory_kills: int | None = None
    """Processes of the node that the kernel killed for want of memory, ever."""
    missing: str = ""
    """Why nothing could be learned."""
    node_died: bool = False


GONE = Evidence(missing="its log is gone with it", node_died=True)


def gather(pid: int | None, log: str | None) -> Evidence:
    """From this node."""
    log = log or (log_of(pid) if pid else None)
    return Evidence(exits.of(pid) if pid else None, log_end(log) if log else "", memory_kills())


def gathered(process: Process) -> Evidence:
    """From the node of the process; takes at most some ten seconds."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if is_here(process.node_id):
        return gather(process.pid, process.log)
    if not _lives(process.node_id):
        return GONE
    there = NodeAffinitySchedulingStrategy(str(process.node_id), soft=False)
    task: Any = ray.remote(gather).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    try:
        found: Evidence = ray.get(task.remote(process.pid, process.log), timeout=ANSWER_SECONDS)
        return found
    except Exception as error:
        if not _lives(process.node_id):  # Ray takes seconds to notice
            return GONE
        return Evidence(missing=f"its node did not tell more ({type(error).__name__})")


def _lives(node_id: str | None) -> bool:
    """Whether a node is up, as far as Ray knows."""
    import ray

    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def is_here(node_id: str | None) -> bool:
    """Whether that is this process's node, as far as is known."""
    import ray

    return node_id is None or (ray.is_initialized() and node_id == ray.get_runtime_context().get_node_id())


def log_of(pid: int) -> str | None:
    """The file with what a worker of Ray on this node writes on standard error."""
    import ray

    node = ray._private.worker._global_node
    if node is None:
        return None
    logs = sorted(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.err"))
    return str(logs[-1]) if logs else None


def log_end(log: str, only: re.Pattern[str] | None = None) -> str:
    """The last lines of a file, ``only`` those, in one; empty if there is none."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, Path(log).stat().st_size - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
            return last_words("\n".join(line for line in lines if only is None or only.match(line)))
    except OSError:
        return ""


def memory_kills() -> int | None:
    """Processes of this machine, or of this container, that the kernel killed for want of memory; None if untold."""
    counts = []
    for file, name in KILLS:
        with contextlib.suppress(OSError):
            counts += [int(count) for count in re.findall(rf"^{name} (\d+)$", file.read_text(), re.MULTILINE)]
    return max(counts) if counts else None
