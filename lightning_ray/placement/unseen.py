"""Which nodes do not see a folder: asked by a task on each, which looks for a file that was just written there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ray.errors import ConfigError
from lightning_ray.placement.asks import Ask
from lightning_ray.placement.view import Node

ANSWER_SECONDS = 60.0
"""For all nodes: a worker may have to start on each."""


def unseen(folder: Path, node_ids: Sequence[str]) -> dict[str, str]:
    """The (hex) ids of those nodes that do not see the folder as this process does, each with what is wrong.

    Folders of other kinds of storage are asked for by nobody; a folder that cannot be written here is looked for as it
    is. Blocks for seconds.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = _write_token(folder)
    task: Any = ray.remote(_sees)
    calls = {
        node_id: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(str(folder), token)
        for node_id in node_ids
    }
    wrong, end = {}, time.monotonic() + ANSWER_SECONDS
    try:
        for node_id, call in calls.items():
            try:
                if not ray.get(call, timeout=max(0.1, end - time.monotonic())):
                    wrong[node_id] = "does not see it"
            except Exception as error:
                wrong[node_id] = f"did not answer ({type(error).__name__})"
    finally:
        if token is not None:
            (folder / token).unlink(missing_ok=True)
    return wrong


def _write_token(folder: Path) -> str | None:
    token = f".seen-{secrets.token_hex(8)}"
    try:
        (folder / token).touch()
    except OSError:
        return None
    return token


def _sees(folder: str, token: str | None) -> bool:
    place = Path(folder)
    return (place / token).exists() if token else place.is_dir()


def check_seen(folder: Path, what: str, asks: Sequence[Ask], nodes: Sequence[Node], here: str) -> None:
    """Raises ConfigError if a node where one of the asks may go does not see a folder. ``here`` is this node's id."""
    others = [node for node in nodes if node.node_id != here and node.may_hold(asks)]
    if not others:
        return
    wrong = unseen(folder, [node.node_id for node in others])
    if wrong:
        told = ", ".join(f"{node.address} {wrong[node.node_id]}" for node in others if node.node_id in wrong)
        roles = " and ".join(dict.fromkeys(ask.role for ask in asks))
        raise ConfigError(
            f"{what} {folder} is not on every node where {roles} may go: {told}. Keep it on storage that these nodes "
            "mount at the same path, or place them elsewhere (placement.trainer.label, placement.policy.label)"
        )
