"""The pool of runners: as many Ray actors as the queue needs, each replaced when it ends.

    slot:  start -> runs -> died     -> start; its work is released, with the reason
                         -> drained  -> start, or gone if the pool shrinks

Kept by the process that made it. A runner's death releases its work at once, so that the others play it; how the
number follows the queue is ``lightning_ray.running.sizing``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.runner import STOPPED, RunnerActor
from lightning_ray.agent import LitAgent
from lightning_ray.config import RunnerSettings
from lightning_ray.deaths import Death, Process, death_of
from lightning_ray.deaths.process import Whereabouts
from lightning_ray.errors import InfrastructureError
from lightning_ray.hooks import Hook
from lightning_ray.placement.places import Places
from lightning_ray.running.sizing import Sizing, crowded_node
from lightning_ray.running.travel import pickled
from lightning_ray.store.base import Store
from lightning_ray.threads import ask_ray
from lightning_ray.waiting import waiting

TICK_SECONDS = 1.0
NODES_SECONDS = 10.0
"""Between two looks at how the runners are spread over the nodes."""
SILENT_ASKS = 30
"""So often in a row, about every two seconds, a runner that was up gave no answer within one, when it is killed."""
DEATHS_IN_A_ROW = 5
"""Of one slot, while no runner at all ends a rollout."""
EXPLAIN_SECONDS = 0.5
"""How long a dead runner's work waits for the cause."""
PAUSES = (0.0, 0.0, 0.5, 1.0, 2.0)
"""Seconds before the next start, by deaths in a row."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Slot:
    """A place for one runner, whose lives follow each other in it."""

    name: str
    life: int = 0
    worker_id: str = ""
    actor: Any = None
    info: Whereabouts | None = None
    deaths: list[str] = field(default_factory=list)
    """Reasons of the last deaths in a row."""
    cause: str = ""
    """Of its last death; the same one again is not shown again."""
    ended_at_first_death: int = 0
    leaving: str | None = None
    """Why it is being drained for good."""
    playing: int = 0
    """Attempts that it played when it was last asked."""
    unanswered: int = 0
    """How often in a row it gave no answer."""
    node_id: str | None = None
    """Where it is to be."""
    replaces: Slot | None = None
    """What is drained once this is up where it is to be."""


class RunnerPool:
    """Runners of one agent on one store; ``name`` begins the names of its actors.

    ``failure`` carries the error when runners die again and again, and nothing is ended; ``tell`` hears of each death,
    and whether it is worth showing.
    """

    def __init__(
        self,
        name: str,
        agent: LitAgent[Any],
        store: Store,
        secret: bytes,
        settings: RunnerSettings,
        hooks: Sequence[Hook] = (),
        failure: asyncio.Future[None] | None = None,
        tell: Callable[[Death, bool], None] | None = None,
        places: Places | None = None,
    ):
        self._name = name
        self._store = store
        self._settings = settings
        self._arguments = (ray.put(pickled(agent)), store, secret, settings, list(hooks))
        self._places = places or Places()
        self._options = self._places.runner()
        if environment := getattr(agent, "runtime_env", None):
            self._options["runtime_env"] = dict(environment)
        self._sizing = Sizing(settings)
        self._slots: dict[Slot, asyncio.Task[None]] = {}
        self._made = 0
        self._control: asyncio.Task[None] | None = None
        self._explaining: set[asyncio.Task[str]] = set()
        self._partings: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.restarts = 0
        """How often a runner took the place of one that had died, or was stuck."""
        self._tell = tell
        self.failure = failure or asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Start the runners; they lease whatever is queued from now on."""
        for _ in range(self._settings.minimum):
            self._add()
        self._control = asyncio.create_task(self._keep())

    def status(self) -> list[dict[str, Any]]:
        """The runners: name, worker, node, process, what it plays, deaths in a row, whether it is leaving."""
        return [
            {
                "name": slot.name,
                "worker_id": slot.worker_id,
                "actor": slot.actor,
                "pid": slot.info["pid"] if slot.info else None,
                "node_id": slot.info["node_id"] if slot.info else None,
                "playing": slot.playing,
                "lives": slot.life,
                "deaths_in_a_row": list(slot.deaths),
                "leaving": slot.leaving,
            }
            for slot in self._slots
        ]

    async def stop(self) -> None:
        """Cancel what is being played and end all runners. What was not told to the store is released."""
        self._stopping = True
        if self._control is not None:
            self._control.cancel()
        actors = [slot.actor for slot in self._slots if slot.actor is not None]
        try:
            await asyncio.gather(*(actor.stop.remote() for actor in actors), return_exceptions=True)
            await asyncio.gather(*self._slots.values(), *self._partings, return_exceptions=True)
        finally:
            for task in (*self._slots.values(), *self._partings):
                task.cancel()
            for actor in actors:
                _kill(actor)

    # --- one slot ---------------------------------------------------------------------------------------------

    def _add(self, node_id: str | None = None, replaces: Slot | None = None) -> None:
        slot = Slot(f"runner-{self._made}", node_id=node_id, replaces=replaces)
        self._made += 1
        task = asyncio.create_task(self._live(slot))
        self._slots[slot] = task
        task.add_done_callback(lambda _: self._slots.pop(slot, None))

    async def _live(self, slot: Slot) -> None:
        """A slot's lives, until it leaves or the pool stops."""
        while not self._stopping and slot.leaving is None:
            slot.life += 1
            self.restarts += slot.life > 1
            slot.worker_id = f"{slot.name}-{uuid.uuid4().hex[:6]}"
            slot.info, slot.unanswered, slot.playing = None, 0, 0
            died = await self._one_life(slot)
            if died is None:
                continue
            parting = asyncio.create_task(self._part(slot, slot.worker_id, *died))
            self._partings.add(parting)
            parting.add_done_callback(self._partings.discard)
            if self._stopping or await self._is_repeated(slot):
                await parting  # otherwise the next life begins at once

    async def _one_life(self, slot: Slot) -> tuple[Process, Exception] | None:
        """From start to end; who died and of what, if it did. Otherwise its work is released before this returns."""
        options = {"name": f"{self._name}/{slot.worker_id}", **self._options}
        if slot.node_id is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(slot.node_id, soft=True)
        actor = slot.actor = RunnerActor.options(**options).remote(slot.worker_id)  # type: ignore[attr-defined]
        running = actor.run.remote(*self._arguments)
        reason, process = STOPPED, Process("runner", slot.worker_id)
        try:
            with waiting("a runner to start"):
                slot.info = await actor.info.remote()
            process = Process.at("runner", slot.worker_id, slot.info)
            await self._take_over(slot)
            reason = await running
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return process, error
        finally:
            slot.actor = None
            _kill(actor)
        await self._release(slot.worker_id, reason)
        return None

    async def _part(self, slot: Slot, worker_id: str, process: Process, error: Exception) -> None:
        """After a death: find out why, have the work played by others, and count it."""
        reason = await self._explained(slot, process, error)
        await self._release(worker_id, reason)
        if not self._stopping and slot.leaving is None:
            await self._after_death(slot, reason)

    async def _explained(self, slot: Slot, process: Process, error: Exception) -> str:
        """Why a runner died, as far as that can be told at once: another node takes seconds, and its work must not wait
        for it. The run is told when all is known.
        """

        async def explain() -> str:
            death = await ask_ray(death_of, process, error)
            if self._tell is not None and not self._stopping:
                self._tell(death, death.cause != slot.cause)
            slot.cause = death.cause
            return f"{death.cause} ({process.place})"

        explaining = asyncio.create_task(explain())
        self._explaining.add(explaining)
        explaining.add_done_callback(self._explaining.discard)
        done, _ = await asyncio.wait([explaining], timeout=EXPLAIN_SECONDS)
        if done:
            return explaining.result()
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"{said[-1].strip()[:300]} ({process.place})"

    async def _release(self, worker_id: str, reason: str) -> None:
        try:
            await self._store.release_worker(worker_id, reason)
        except Exception:  # its leases end by themselves
            logger.exception("what runner %s was at could not be released", worker_id)

    async def _is_repeated(self, slot: Slot) -> bool:
        """Whether the slot's runner died before, and no rollout has ended since."""
        return bool(slot.deaths) and await self._ended() <= slot.ended_at_first_death

    async def _after_death(self, slot: Slot, reason: str) -> None:
        """Count the death; fail, or wait a little, if there were several and nothing was ended meanwhile."""
        ended = await self._ended()
        if not slot.deaths or ended > slot.ended_at_first_death:
            slot.deaths, slot.ended_at_first_death = [], ended
        slot.deaths.append(reason)
        if len(slot.deaths) >= DEATHS_IN_A_ROW and not self.failure.done():
            self.failure.set_exception(
                InfrastructureError(
                    f"{slot.name} died {len(slot.deaths)} times in a row, and no rollout was ended meanwhile; "
                    f"last: {reason}"
                )
            )
            self.failure.exception()
        await asyncio.sleep(PAUSES[min(len(slot.deaths), len(PAUSES)) - 1])

    async def _ended(self) -> int:
        """How many rollouts have ended."""
        try:
            by_status = (await self._store.statistics())["rollouts_by_status"]
        except Exception:
            return 0
        return sum(by_status.get(status, 0) for status in ("succeeded", "failed"))

    # --- all slots --------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Follow the queue, the nodes and the silent, for ever."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                await self._resize()
                if time.monotonic() - looked > NODES_SECONDS:
                    looked = time.monotonic()
                    await self._spread()
                await self._look_for_silent()
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("the pool of runners could not be looked after; it goes on")

    async def _resize(self) -> None:
        if self._settings.minimum == self._settings.maximum and len(self._staying()) == self._settings.minimum:
            return
        statistics = await self._store.statistics()
        work = statistics["queued"] + statistics["live_attempts"]
        change = self._sizing.change(len(self._staying()), work, time.monotonic())
        for _ in range(change):
            self._add()
        for slot in self._staying()[::-1][: max(0, -change)]:
            await self._drain(slot, "there is less to do")

    def _staying(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.leaving is None]

    async def _drain(self, slot: Slot, reason: str) -> None:
        """Let a runner end what it plays and go."""
        slot.leaving = reason
        if slot.actor is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(TICK_SECONDS):  # it may be stuck, and is killed for that elsewhere
                    await slot.actor.drain.remote(reason)

    async def _spread(self) -> None:
        """Replace a runner of a crowded node by one on a node that has fewer, when all are up."""
        nodes = await ask_ray(_nodes_for_runners, self._places)
        if any(slot.info is None for slot in self._slots):
            return
        runners = {slot: slot.info["node_id"] for slot in self._staying() if slot.info is not None}
        if (move := crowded_node(Counter(runners.values()), nodes)) is not None:
            crowded, roomy = move
            self._add(roomy, next(slot for slot, node in runners.items() if node == crowded))

    async def _take_over(self, slot: Slot) -> None:
        """Let the runner that this one replaces go; or this one, if it came up elsewhere."""
        replaced, slot.replaces, node_id, slot.node_id = slot.replaces, None, slot.node_id, None
        if replaced is not None and slot.info is not None:
            is_there = slot.info["node_id"] == node_id
            await self._drain(replaced if is_there else slot, "runners are spread over the nodes")

    async def _look_for_silent(self) -> None:
        """Kill runners that do not answer: their processes are stuck as a whole."""
        slots = [slot for slot in self._slots if slot.info is not None and slot.actor is not None]

        async def ask(slot: Slot) -> None:
            actor = slot.actor
            slot.unanswered += 1
            with contextlib.suppress(Exception):
                async with asyncio.timeout(TICK_SECONDS):
                    slot.playing = await actor.playing.remote()
                slot.unanswered = 0
            if slot.actor is actor and slot.unanswered >= SILENT_ASKS:
                logger.warning("%s gave no answer %s times in a row and is killed", slot.worker_id, SILENT_ASKS)
                _kill(actor)

        await asyncio.gather(*(ask(slot) for slot in slots))


def _kill(actor: Any) -> None:
    with contextlib.suppress(Exception):
        ray.kill(actor)


def _nodes_for_runners(places: Places) -> list[str]:
    nodes = (node for node in ray.nodes() if node["Alive"] and places.allows("runner", node["Labels"]))
    return [node["NodeID"] for node in nodes if node["Resources"].get("CPU", 0) >= 1]
