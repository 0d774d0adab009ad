"""The front door to Ray: starts and ends everything a run has running.

The only file of the library that looks at ``actors`` and ``deployments``. Joins the Ray of RAY_ADDRESS (inside a
submitted job, say) or of an explicit address, and otherwise starts one of its own, which it ends with all that grew
out of it.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ray.agent import LitAgent
from lightning_ray.applications import Applications
from lightning_ray.capture.audience import POLICY, one_of_several
from lightning_ray.config import EngineSettings, RunnerSettings
from lightning_ray.deaths import Death
from lightning_ray.deaths.watch import DeathWatch
from lightning_ray.dropped import forget_collected
from lightning_ray.errors import ConfigError, InfrastructureError, last_line
from lightning_ray.hooks import Hook
from lightning_ray.mirror.place import url_of
from lightning_ray.own_ray import OwnRay, check_apart
from lightning_ray.placement.asks import Wanted
from lightning_ray.placement.heard import check_heard
from lightning_ray.placement.places import Places
from lightning_ray.placement.room import make_room
from lightning_ray.placement.settings import Placement
from lightning_ray.placement.unseen import check_seen
from lightning_ray.placement.view import look, nodes_now
from lightning_ray.policy.loaded import Loaded
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.swap import PolicySwapper
from lightning_ray.policy.transfer import transfer_of
from lightning_ray.relay.settings import Upstream
from lightning_ray.run.events import Events
from lightning_ray.run.state import ONLY
from lightning_ray.serving import leave_serve, policy_options
from lightning_ray.stopping import sigterm_kept
from lightning_ray.store.base import Store
from lightning_ray.store.client import StoreClient
from lightning_ray.store.shards import ShardedStore
from lightning_ray.threads import ask_ray, until_nobody_asks
from lightning_ray.types import ProxyLLM

if TYPE_CHECKING:
    from actors.runner_pool import RunnerPool

LOGICAL_CPUS = 16
"""Ray's CPUs are bookkeeping here: a laptop with two cores holds every actor of a small run."""
STOP_SECONDS = 8.0
ASKED_SECONDS = 11.0
"""For what threads are asking Ray, before it is shut down: another node, why a part of it died."""
LEASE_SECONDS = 30.0
"""How long a runner may be silent (it beats every two seconds) before its rollouts are played elsewhere."""


class Cluster:
    """A run's Ray: the span store, a deployment and trainer ranks for each policy, the relay and the runners.

    Policies go by their names; the only one of a run has its own, which need not be given. ``run`` is the run's name:
    Ray shows its actors as ``{run}/store``, ``{run}/trainer-0``, ``{run}/runner-3-...``.
    """

    def __init__(
        self,
        address: str | None = None,
        num_cpus: int | None = None,
        relays: Mapping[str, Upstream] | None = None,
        run: str = "run",
        placement: Placement | None = None,
    ):
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.owned = self.address == "local"
        self._num_cpus = num_cpus or LOGICAL_CPUS
        self.places = Places(placement)
        self._own: OwnRay | None = None
        self._joined = False
        self.run = run
        self._name = f"{plain_name(run)}-{secrets.token_hex(4)}"
        """Of the namespace in Ray, and of the applications in Serve: no two runs have the same."""
        self.secret = secrets.token_bytes(32)
        self.runners: RunnerPool | None = None
        self.store: Store | None = None
        self._store_actors: list[Any] = []
        self.applications = Applications(self._name, alone=self.owned)
        self._trainers: dict[str, Any] = {}
        self._groups: Counter[str] = Counter()
        """How often each policy's trainer ranks were started."""
        self._relays = dict(relays or {})
        self.failure: asyncio.Future[None] | None = None
        """Carries why the run cannot go on: runners that die again and again, or Ray itself."""
        self.events = Events()
        self._deaths: DeathWatch | None = None

    def start_ray(self, wanted: Wanted | None = None) -> None:
        """Start or join Ray; a Ray of our own counts as many CPUs as what is wanted takes, if that is more than usual.

        Raises ConfigError when a foreign ``actors`` package hides ours, or this process has a Ray already;
        InfrastructureError when there is no Ray.
        """
        check_packages()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a late call must not start another Ray after ours has ended
        from ray._private import auto_init_hook

        auto_init_hook.enable_auto_connect = False  # the same where ray was imported before
        forget_collected()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": self._name}
        with sigterm_kept():
            if self.owned:
                needed = ceil(wanted.cpus(self.places.placement)) if wanted else 0
                options["num_cpus"] = max(self._num_cpus, needed)
                self._own = OwnRay.start(self._front_door, options)
            else:
                self._join(options)
        self.failure = asyncio.get_running_loop().create_future()
        self._deaths = DeathWatch(self.events.death, lambda: self.applications.names, self._ray_died)
        self._deaths.start()

    def _join(self, options: dict[str, Any]) -> None:
        import ray

        check_apart()
        try:
            ray.init(self.address, **options)
        except Exception as error:
            raise InfrastructureError(
                f"no Ray can be joined at address={self.address!r} ({last_line(error)}): is it up, with this "
                "RAY_AUTH_MODE and token?"
            ) from error
        self._joined = True

    async def make_room(self, wanted: Wanted, note: Callable[[str], None], seen: Mapping[str, Path]) -> None:
        """Find out where the run's parts go; returns once there is room for them.

        Raises ConfigError if they have no place, if agents would not reach the policy, or if nodes of trainer ranks and
        replicas do not see the folders in ``seen``, which go by what they are.
        """
        view = await ask_ray(look, not self.owned)
        self.places = Places(self.places.placement, view.labels())
        asks, here = wanted.asks(self.places.placement, view.labels()), ray_node_id()
        hosts = [engine.host for engine in wanted.engines.values()]
        check_heard("engine.host", hosts, asks, view.grown(1), here)
        if self._relays and not hosts:
            check_heard("placement.relay_host", [self.places.placement.relay_host], asks, view.grown(1), here)
        await make_room(asks, view, self.places.placement.wait_seconds, note)
        readers = [ask for ask in asks if ask.role in ("trainer", "policy")]
        for what, folder in seen.items() if readers else ():
            if url_of(folder) is not None:  # other nodes get it from there
                continue
            await ask_ray(check_seen, folder, what, readers, await ask_ray(nodes_now), here)

    def _ray_died(self, death: Death) -> None:
        assert self.failure is not None
        if not self.failure.done():
            self.failure.set_exception(InfrastructureError(str(death)))
            self.failure.exception()

    def _front_door(self, folder: Path) -> dict[str, str | None]:
        """What the processes of a Ray of our own need to know before they start, and what agents' processes must not
        know: the keys of upstreams.
        """
        from deployments.haproxy import haproxy_environment

        keys = [upstream.api_key_env for upstream in self._relays.values() if upstream.api_key_env]
        return {**haproxy_environment(folder / "haproxy"), **dict.fromkeys(keys)}

    def start_store(self, folder: Path, shards: int = 1) -> Store:
        """The run's span store, of ``shards`` processes, on the cluster's nodes in turn."""
        from actors.span_store import start_shards

        self._store_actors = start_shards(
            folder, f"{self.run}/store", shards, lease_seconds=LEASE_SECONDS, among=partial(self.places.allows, "store")
        )
        assert self._deaths is not None
        for shard, actor in enumerate(self._store_actors):
            self._deaths.know(actor, "span store", f"shard {shard}" if shards > 1 else "")
        clients = [StoreClient(actor) for actor in self._store_actors]
        self.store = clients[0] if shards == 1 else ShardedStore(clients)
        return self.store

    async def store_processes(self) -> list[int]:
        """Ids of the processes that hold the store; another one after a restart."""
        return await asyncio.gather(*(actor.process_id.remote() for actor in self._store_actors))

    def whereabouts(self) -> dict[str, Any]:
        """How to reach the run: Ray's address and namespace, the store's actor (or the root of its shards' names)."""
        import ray

        return {
            "address": ray.get_runtime_context().gcs_address,
            "namespace": self._name,
            "store": f"{self.run}/store",
            "shards": len(self._store_actors),
        }

    async def start_policy(
        self, model: Path, model_name: str, settings: EngineSettings, loaded: Loaded | None = None, name: str = ONLY
    ) -> ProxyLLM:
        """Serve the model; returns the endpoint that agents use.

        Answers start with the first proved push; with ``loaded``, under the weights of the folder and without one.
        """
        from deployments.policy import Policy

        options = policy_options(settings, self.places)
        audience = POLICY if name == ONLY else one_of_several(name)
        tags = {"run": self.run, "policy": name}
        application = Policy.options(**options).bind(  # type: ignore[attr-defined]
            str(model), model_name, settings, self.store, self.secret, loaded, audience, tags
        )
        address = await self.applications.policy(name, application, settings)
        return ProxyLLM(endpoint=f"{address}/v1", model=model_name)

    async def start_relay(self) -> dict[str, ProxyLLM]:
        """Serve the relay, beside the policy or alone; returns the endpoints that agents use, by name."""
        if not self._relays:
            return {}
        from deployments.relay import bind

        assert self.store is not None
        application = bind(self._relays, self.store, self.secret, self.run)
        address = await self.applications.relay(application, self.places.placement.relay_host)
        return {
            name: ProxyLLM(endpoint=f"{address}/to/{name}/v1", model=upstream.model or name)
            for name, upstream in self._relays.items()
        }

    async def replicas(self, method: str, *arguments: Any) -> list[Any]:
        """Call a control method on every live replica of the only policy."""
        return await self.applications.replicas_of(ONLY)(method, *arguments)

    @property
    def trainers(self) -> Any:
        """The trainer ranks of the only policy."""
        return self._trainers[ONLY]

    async def start_trainers(self, settings: UpdateSettings, ranks: int, transfer: str, name: str = ONLY) -> Any:
        """A policy's trainer ranks, ready to push weights."""
        from actors.policy_trainer import PolicyTrainerGroup

        self._groups[name] += 1
        called = f"{self.run if name == ONLY else f'{self.run}/{name}'}/trainer"
        if self._groups[name] > 1:  # the names of ranks that were killed may not be free yet
            called += f"-life-{self._groups[name]}"
        starting = PolicyTrainerGroup.start(
            settings,
            ranks=ranks,
            called=called,
            tell=partial(self.events.death, shown=False),
            wait_seconds=self.places.placement.wait_seconds,
            ask=self.places.ranks(ranks, settings.gpu_share if settings.device == "cuda" else 0),
        )
        trainers = self._trainers[name] = await self._unless_failed(starting)
        await trainers.call("load_transfer", transfer, timeout=120.0)
        return trainers

    async def _unless_failed(self, work: Any) -> Any:
        """Await, unless the run cannot go on."""
        assert self.failure is not None
        task = asyncio.ensure_future(work)
        await asyncio.wait({task, self.failure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            self.failure.result()
        return task.result()

    async def connect(self, settings: EngineSettings, name: str = ONLY) -> PolicySwapper:
        """Tie a policy's trainer ranks to its replicas."""
        deadline, trainers = settings.swap_timeout_seconds, self._trainers[name]
        replicas, policy = self.applications.replicas_of(name), self.applications.handle(name)
        [way, *_] = {member["transfer"] for member in await replicas("describe")}
        await trainers.call("attach_policy", policy, way, deadline, timeout=60.0)
        tolerance = settings.chosen_tolerance
        transfer = transfer_of(way, replicas, trainers, tolerance, deadline)
        coarse, seconds = settings.chosen_dtype == "bfloat16", settings.startup_timeout_seconds
        return PolicySwapper(replicas, trainers, transfer, tolerance, deadline, seconds, coarse)

    def start_runners(self, agent: LitAgent[Any], settings: RunnerSettings, hooks: Sequence[Hook] = ()) -> None:
        """The runners; they lease whatever is queued from now on."""
        from actors.runner_pool import RunnerPool

        assert self.store is not None and self.failure is not None
        self.runners = RunnerPool(
            self.run, agent, self.store, self.secret, settings, hooks, self.failure, self.events.death, self.places
        )
        self.runners.start()

    async def stop(self) -> None:
        """End everything that this run started; nothing is left behind. Takes at most some twenty seconds."""
        import ray

        if self._deaths is not None:
            self._deaths.stop()
        if self._own is not None:
            self._own.remember()
        if (self._own is not None or self._joined) and ray.is_initialized():
            with suppress(Exception):  # a part that does not end is ended below, or by its owner's end
                async with asyncio.timeout(STOP_SECONDS):
                    await self._stop_actors()
            await until_nobody_asks(ASKED_SECONDS)
            await leave_serve()
        # In this thread: nothing of this loop may call Ray meanwhile.
        if self._own is not None:
            self._own.end()
        elif self._joined:
            ray.shutdown()

    async def _stop_actors(self) -> None:
        # A part that is dead already must not keep the others from being ended.
        if self.runners is not None:
            await self.runners.stop()
        for trainers in self._trainers.values():
            trainers.stop()
        from ray import serve

        closing = [actor.close.remote() for actor in self._store_actors]
        deleting = [ask_ray(serve.delete, application) for application in self.applications.names if not self.owned]
        await asyncio.gather(*closing, *deleting, return_exceptions=True)


def ray_node_id() -> str:
    """The (hex) id of this process's node."""
    import ray

    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def plain_name(run: str) -> str:
    """A run's name as part of an address, in letters and digits that need no escaping."""
    return re.sub(r"[^a-zA-Z0-9._-]+", "-", run).strip("-.") or "run"


def check_packages() -> None:
    """``actors`` and ``deployments`` must be ours. Raises ConfigError naming the path of a stranger."""
    import actors
    import deployments

    home = Path(__file__).resolve().parent.parent
    for package in (actors, deployments):
        found = Path(package.__file__ or "?").resolve()
        if found.parent.parent != home:
            raise ConfigError(
                f"the package {package.__name__!r} is {found}, not lightning-ray's under {home}: another package "
                "of that name comes first on sys.path; rename it or start from another folder"
            )
