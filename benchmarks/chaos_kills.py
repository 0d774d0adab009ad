"""What is killed, one small function each: how its process is found, and when its role is done again."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import psutil
from ray import serve

from benchmarks.chaos_cluster import Actor, actors, kill
from benchmarks.chaos_train import RUNNERS
from benchmarks.chaos_watch import Scene
from lightning_ray.threads import in_thread
from lightning_ray.types import TERMINAL_ROLLOUT

Question = Callable[[], Awaitable[bool]]


class Struck(NamedTuple):
    """A kill that was done: when (Unix seconds), and whether the role is done again."""

    at: float
    back: Question


async def runner(scene: Scene) -> Struck:
    """The runner that plays most. Back: see ``runners_back``."""
    playing = await scene.playing()
    victim = max(actors("RunnerActor"), key=lambda actor: len(playing.get(actor.name, ())))
    at = kill(victim.pid)
    return Struck(at, runners_back(scene, at, {victim.name: playing.get(victim.name, [])}))


async def store(scene: Scene) -> Struck:
    """Back: an append that was begun after the kill is acknowledged."""
    [victim] = actors("SpanStoreActor")
    at = kill(victim.pid)

    async def back() -> bool:
        return scene.probe.last_begun > at

    return Struck(at, back)


async def replica(scene: Scene) -> Struck:
    """Back: as many replicas as before, all proved, and the new one has been given a call."""
    members = await scene.replicas()
    victim = random.choice(members)
    back = await replicas_back(scene, len(members), {victim["replica_id"]})
    return Struck(kill(victim["pid"]), back)


async def trainer_rank(scene: Scene) -> Struck:
    """Back: the next update by new ranks is done, and its step recorded."""
    victim = random.choice(actors("PolicyTrainer"))
    back = ranks_back(scene)
    return Struck(kill(victim.pid), back)


async def controller(scene: Scene) -> Struck:
    """Back: a new process of Serve's controller tells that the application runs."""
    [victim] = actors("ServeController")

    async def back() -> bool:
        if [actor.pid for actor in actors("ServeController")] in ([], [victim.pid]):
            return False
        status = await in_thread(serve.status)
        return status.applications[scene.application].status == "RUNNING"

    return Struck(kill(victim.pid), back)


async def proxy(scene: Scene) -> Struck:
    """HAProxy itself. Back: an agent's call that was begun after the kill is answered."""
    [manager] = actors("HAProxyManager")
    at = kill(haproxy_of(manager)[-1].pid)
    return Struck(at, answered_since(scene, at))


async def proxy_manager(scene: Scene) -> Struck:
    """The actor that keeps HAProxy. Back: another one has an HAProxy of its own, and a call begun since is answered."""
    [victim] = actors("HAProxyManager")
    at = kill(victim.pid)
    answered = answered_since(scene, at)

    async def back() -> bool:
        others = [actor for actor in actors("HAProxyManager") if actor.pid != victim.pid]
        return bool(others and haproxy_of(others[0])) and await answered()

    return Struck(at, back)


async def node(scene: Scene) -> Struck:
    """The worker node with most of the run, after another one has joined. Back: all that it had, elsewhere."""
    scene.nodes.add()
    held = {node_id: on(node_id) for node_id in scene.nodes.workers()}
    victim = max(held, key=lambda node_id: len(held[node_id]))
    playing = await scene.playing()
    names = {actor.name for actor in held[victim]}
    lost = {actor.name: playing.get(actor.name, []) for actor in actors("RunnerActor") if actor.name in names}
    backs: list[Question] = []
    members = await scene.replicas()
    if taken := {m["replica_id"] for m in members if m["pid"] in {actor.pid for actor in held[victim]}}:
        backs.append(await replicas_back(scene, len(members), taken))
    if any(actor.name in names for actor in actors("PolicyTrainer")):
        backs.append(ranks_back(scene))
    at = scene.nodes.kill(victim)
    backs.append(runners_back(scene, at, lost))

    async def back() -> bool:
        return all([await each() for each in backs])

    return Struck(at, back)


KILLS: dict[str, Callable[[Scene], Awaitable[Struck]]] = {
    "runner": runner,
    "store": store,
    "replica": replica,
    "controller": controller,
    "trainer_rank": trainer_rank,
    "proxy": proxy,
    "proxy_manager": proxy_manager,
    "node": node,
}
"""By the names of their figures; the driver's is ``chaos``'s."""


def on(node_id: str) -> list[Actor]:
    """The run's actors on a node."""
    kinds = ("RunnerActor", "PolicyTrainer", "ServeReplica")
    return [actor for kind in kinds for actor in actors(kind) if actor.node_id == node_id]


def haproxy_of(manager: Actor) -> list[psutil.Process]:
    """Its HAProxy processes, the one that serves last."""
    found = [child for child in psutil.Process(manager.pid).children() if child.name() == "haproxy"]
    return sorted(found, key=lambda process: process.create_time())


def runners_back(scene: Scene, at: float, lost: dict[str, list[str]]) -> Question:
    """Whether as many runners as before play or have asked for rollouts since, and what each of the lost ones played is
    played again or has ended.
    """

    async def back() -> bool:
        playing = await scene.playing()
        workers = await scene.store.query_workers()
        asked = {worker.worker_id for worker in workers if (worker.last_dequeue_time or 0.0) > at}
        if len((playing.keys() | asked) - lost.keys()) < RUNNERS:
            return False
        rollouts = [rollout_id for ids in lost.values() for rollout_id in ids]
        played = {rollout_id for worker, ids in playing.items() if worker not in lost for rollout_id in ids}
        open_still = [rollout_id for rollout_id in rollouts if rollout_id not in played]
        found = await scene.store.query_rollouts(rollout_id_in=open_still) if open_still else []
        return all(rollout.status in TERMINAL_ROLLOUT for rollout in found)

    return back


async def replicas_back(scene: Scene, count: int, lost: set[str]) -> Question:
    """Whether there are ``count`` replicas again, none of the lost, all proved, and new ones were given calls."""
    known = set(await scene.given())

    async def back() -> bool:
        members = await scene.replicas()
        if len(members) < count or any(m["replica_id"] in lost or not m["proved"] for m in members):
            return False
        calls = await scene.given()
        return sum(calls[server] > 0 for server in calls if server not in known) >= len(lost)

    return back


def ranks_back(scene: Scene) -> Question:
    """Whether a step was made by ranks that were started since now."""
    before = scene.trainer_restarts()

    async def back() -> bool:
        return scene.trainer_restarts() > before

    return back


def answered_since(scene: Scene, at: float) -> Question:
    """Whether a call that was begun since then has been answered."""

    async def back() -> bool:
        return any(note["began"] > at for note in scene.fresh_notes(at))

    return back
