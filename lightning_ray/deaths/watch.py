"""Notices the deaths that no call of the run would: those of parts that are started again by Ray or by Serve.

    every few seconds:  Serve's named actors  --which are the run's-->  known
                        known, in Ray's actor table  --restarted or dead-->  Death  --> events
                        Ray's nodes, and the processes of a Ray of our own  --gone-->  Death  --> events

Runners and trainer ranks are not among them: who calls these is told at once. What the run or Serve ended on purpose is
not told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lightning_ray.deaths.death import Death, death_of
from lightning_ray.deaths.evidence import Evidence, exits, is_here, log_end, memory_kills
from lightning_ray.deaths.process import Process
from lightning_ray.deaths.told import Told, told_by_table
from lightning_ray.threads import ask_ray

WATCH_SECONDS = 3.0
LOOK_SECONDS = 20.0
"""For one look at Ray's tables."""
SERVE = "serve"
"""Ray's namespace of Serve's actors."""
_ALARM = re.compile(r"^\[[^]]* [EF] \d+ \d+\]")
"""Lines of Ray's own processes that tell of trouble."""
REPLACED = Told("exit", "ended by Serve: its health check failed, or it was one too many")
"""A replica that Serve took away, whose log may tell why."""
VITAL = {"gcs_server": "GCS server", "raylet": "raylet"}
"""Processes without which a Ray is dead."""

logger = logging.getLogger(__name__)


@dataclass
class Known:
    """An actor that is watched."""

    process: Process
    ended: int | None = None
    """Lives whose end was told; None before the first look."""


class DeathWatch:
    """Of one run, in the process that started it.

    Args:
        tell: what becomes of a death.
        applications: names of the run's applications in Serve, as they are at the time.
        fatal: is told when a Ray of our own is dead.
    """

    def __init__(
        self,
        tell: Callable[[Death], None],
        applications: Callable[[], Sequence[str]],
        fatal: Callable[[Death], None],
    ):
        self._tell = tell
        self._applications = applications
        self._fatal = fatal
        self._known: dict[str, Known] = {}
        self._seen: set[str] = set()
        """Names of Serve's actors."""
        self._found: SimpleQueue[Death] = SimpleQueue()
        """What a look found, which is made in a thread and may break off."""
        self._nodes: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """From now on, until ``stop``."""
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """What ends from now on was meant to; a look that is under way is broken off."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
        exits.close()

    def know(self, actor: Any, role: str, name: str, ended: int | None = 0) -> None:
        """Watch an actor, by its handle; one that is not new with ``ended=None``."""
        self._known[actor._actor_id.hex()] = Known(Process(role, name), ended)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if (death := ray_died()) is not None:
                self._tell(death)
                self._fatal(death)
                return
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await ask_ray(self._look)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # Ray's tables may be out of reach for a while
                logger.info("Ray's tables could not be read: %s", error)
            while not self._found.empty():
                self._tell(self._found.get())

    def _look(self) -> None:
        self._look_at_nodes()
        self._find()
        for actor_id in list(self._known):
            if self._stopped:
                return
            self._look_at(actor_id)

    def _find(self) -> None:
        """Serve's actors are known by their names: replicas come and go."""
        import ray

        applications = self._applications()
        if not applications:
            return
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] != SERVE or actor["name"] in self._seen:
                continue
            if self._stopped:
                return
            role, name = role_of(actor["name"], applications)
            self._seen.add(actor["name"])
            if role is not None:
                with contextlib.suppress(ValueError):  # it is gone already
                    self.know(ray.get_actor(actor["name"], SERVE), role, name, None)

    def _look_at(self, actor_id: str) -> None:
        """Find out about an actor's end since the last look; afterwards it is known as it is now."""
        import ray

        known, row = self._known[actor_id], ray._private.state.actors(actor_id)
        if not row:
            return
        state, ended = row["State"], row["NumRestarts"] + (row["State"] == "DEAD")
        before = known.ended if known.ended is not None else row["NumRestarts"]
        told = untold(known.process.role, state, told_by_table(row["DeathCause"])) if ended > before else None
        if told is not None and told.kind == "node" and known.process.node_id in self._nodes:
            return  # the next look tells of the node first, with what ran on it
        known.ended = ended
        if told is not None:
            self._found.put(death_of(known.process, told))
        if state == "ALIVE" and row["Pid"] != known.process.pid:
            known.process = _living(known.process, row)
        if state == "DEAD":
            del self._known[actor_id]

    def _look_at_nodes(self) -> None:
        import ray

        for node in ray.nodes():
            node_id, address = node["NodeID"], node["NodeManagerAddress"]
            if node["Alive"]:
                self._nodes[node_id] = address
            elif self._nodes.pop(node_id, None) is not None:
                why = node.get("DeathReasonMessage") or node.get("DeathReason") or "it no longer answers Ray's head"
                process = Process("node", node.get("NodeName") or address, None, node_id, address)
                death = death_of(process, Told("node", " ".join(str(why).split())))
                processes = [known.process for known in list(self._known.values())]
                ran = [str(process) for process in processes if process.node_id == node_id]
                self._found.put(replace(death, lost=f"what ran on it: {', '.join(ran)}") if ran else death)


def untold(role: str, state: str, told: Told) -> Told | None:
    """What nobody else tells of an end; None for one that the run or Serve meant, or the part itself."""
    meant = told.kind == "killed" or "INTENDED" in told.words
    if state == "DEAD" and meant:
        return REPLACED if role == "policy replica" else None
    return told if told.words else Told("wordless", "")


def role_of(actor: str, applications: Sequence[str]) -> tuple[str | None, str]:
    """Role and name of an actor of Serve's by its name there; no role if it is not the run's."""
    kind, _, rest = actor.partition("::")
    if kind == "SERVE_REPLICA":
        application, deployment, replica = rest.split("#")
        role = "relay" if deployment.lower() == "relay" else "policy replica"
        return (role, replica) if application in applications else (None, "")
    if actor == "SERVE_CONTROLLER_ACTOR":
        return "Serve's controller", ""
    return ("Serve's proxy", "") if actor.startswith("SERVE_PROXY_ACTOR") else (None, "")


def _living(process: Process, row: Any) -> Process:
    """A process as Ray's table has it."""
    address = row["Address"]
    kills = memory_kills() if is_here(address["NodeID"]) else None
    where = {"pid": row["Pid"], "node_id": address["NodeID"], "node": address["IPAddress"], "memory_kills": kills}
    return Process.at(process.role, process.name, where)


def ray_died() -> Death | None:
    """The end of a process without which the Ray of our own is dead."""
    import ray

    node = ray._private.worker._global_node
    for kind, name in VITAL.items():
        for started in node.all_processes.get(kind, []) if node is not None else []:
            if (code := started.process.poll()) is not None:
                logs = Path(node.get_logs_dir_path())
                ends = (log_end(str(logs / f"{kind}.{end}"), _ALARM) for end in ("err", "out"))
                from lightning_ray.deaths.exits import signal_name

                how = f"killed by {signal_name(-code)}" if code < 0 else f"it exited with code {code}"
                process = Process("Ray", f"({name})", started.process.pid)
                return death_of(process, Told("exit", how), Evidence(words=next(filter(None, ends), "")))
    return None
