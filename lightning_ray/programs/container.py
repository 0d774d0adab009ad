"""A program in a container: the command line of docker or podman around it.

The container shares the host's network, so that endpoints on this machine are the same inside; the attempt's folder
has the same path inside. Values of variables are not on the command line: the client takes them from its environment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_ray.errors import AgentError

ENGINES = ("docker", "podman")


def find_engine(wanted: str | None) -> str:
    """Path of the wanted engine, or of the first there is. Raises AgentError if there is none."""
    names = ENGINES if wanted is None else (wanted,)
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise AgentError(
        f"image= needs a container engine, and there is no {' or '.join(names)} on PATH={os.environ.get('PATH', '')!r} "
        "of this machine; install one, or leave image= out"
    )


def container_command(
    engine: str,
    image: str,
    command: Sequence[str],
    *,
    name: str,
    variables: Iterable[str],
    folders: Sequence[Path],
    workdir: Path | None,
    interactive: bool = False,
    memory_bytes: int | None = None,
    cpu_seconds: int | None = None,
) -> list[str]:
    """The engine's command line. ``workdir`` None leaves the image's own."""
    line = [engine, "run", "--rm", "--init", "--name", name, "--network", "host"]
    if interactive:
        line.append("--interactive")
    if Path(engine).name == "podman":
        line += ["--userns", "keep-id"] if os.getuid() else []
    else:
        line += ["--user", f"{os.getuid()}:{os.getgid()}"]  # what it writes is ours to remove
    for folder in folders:
        line += ["--volume", f"{folder}:{folder}"]
    if workdir is not None:
        line += ["--workdir", str(workdir)]
    for variable in sorted(variables):
        line += ["--env", variable]
    if memory_bytes is not None:
        line += ["--memory", str(memory_bytes)]
    if cpu_seconds is not None:
        line += ["--ulimit", f"cpu={cpu_seconds}"]
    return [*line, image, *command]


def removal_command(engine: str, name: str) -> list[str]:
    """Ends a container whose client was killed."""
    return [engine, "rm", "--force", name]
