"""A runner that is driven by hand, one rollout after the other, in the thread and event loop of its caller.

So breakpoints work, in agents that are async and in others. Names and meaning as the LitAgentRunner of Agent
Lightning 0.3; the runners of a run are ``lightning_ray.runner``'s.
"""

from __future__ import annotations

import asyncio
import bdb
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from lightning_ray.agent import LitAgent, contained
from lightning_ray.errors import AgentError, ConfigError
from lightning_ray.hooks import Hook, HookRunner
from lightning_ray.instrumentation import instrument_clients
from lightning_ray.parallel import ParallelWorkerBase
from lightning_ray.running.calls import CallsHere, method_of
from lightning_ray.running.play import Play, Stage
from lightning_ray.running.reports import Reports
from lightning_ray.running.resources import ResourceBook
from lightning_ray.store.base import Store
from lightning_ray.tracing import AttemptTrace, OtelTracer, Tracer
from lightning_ray.types import AttemptedRollout, NamedResources, ProxyLLM, Rollout, RolloutMode

T = TypeVar("T")


class StopSignal(Protocol):
    """What tells ``iter`` to stop: a threading.Event, for instance."""

    def is_set(self) -> bool: ...


class LitAgentRunner(ParallelWorkerBase, Generic[T]):
    """Plays an agent on rollouts of a store; ``T`` is a task.

    Args:
        tracer: what hooks and agents see as their tracer.
        max_rollouts: after how many ``iter`` ends.
        poll_interval: seconds after which ``iter`` looks at its stop signal while the queue is empty.
        heartbeat_interval: seconds between two signs of life while an async agent is played; 0 for none.
        interval_jitter, heartbeat_launch_mode, heartbeat_include_gpu: of Agent Lightning 0.3; accepted, without effect.
    """

    def __init__(
        self,
        tracer: Tracer | None = None,
        max_rollouts: int | None = None,
        poll_interval: float = 5.0,
        heartbeat_interval: float = 10.0,
        interval_jitter: float = 0.5,
        heartbeat_launch_mode: str = "thread",
        heartbeat_include_gpu: bool = False,
    ) -> None:
        self.tracer = tracer if tracer is not None else OtelTracer()
        self.max_rollouts = max_rollouts
        self.poll_interval = poll_interval
        self.heartbeat_interval = heartbeat_interval
        self._agent: LitAgent[Any] | None = None
        self._store: Store | None = None
        self._hooks = HookRunner()

    def init(  # type: ignore[override]
        self, agent: LitAgent[Any], *, hooks: Sequence[Hook] | Hook | None = None
    ) -> None:
        """Take up an agent."""
        self._agent = agent
        self._hooks = HookRunner(hooks)
        instrument_clients()
        agent.set_runner(self)  # type: ignore[arg-type]

    def init_worker(self, worker_id: int, store: Store) -> None:  # type: ignore[override]
        """Take up a store."""
        super().init_worker(worker_id)
        self._store = store

    def teardown_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Let go of the store."""
        self._store = None

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the agent."""
        self._agent = None
        self._hooks = HookRunner()

    @contextmanager
    def run_context(
        self,
        *,
        agent: LitAgent[Any],
        store: Store,
        hooks: Sequence[Hook] | Hook | None = None,
        worker_id: int | None = None,
    ) -> Iterator[LitAgentRunner]:
        """The runner with an agent and a store, for as long as the block lasts."""
        number = worker_id or 0
        self.init(agent, hooks=hooks)
        try:
            self.init_worker(number, store)
            try:
                yield self
            finally:
                self.teardown_worker(number)
        finally:
            self.teardown()

    def get_agent(self) -> LitAgent[Any]:
        """The agent. Raises ConfigError outside of ``run_context``."""
        if self._agent is None:
            raise ConfigError("the runner has no agent; use it inside of run_context(agent=..., store=...)")
        return self._agent

    def get_store(self) -> Store:
        """The store. Raises ConfigError outside of ``run_context``."""
        if self._store is None:
            raise ConfigError("the runner has no store; use it inside of run_context(agent=..., store=...)")
        return self._store

    def get_worker_id(self) -> str:
        """What the store knows this runner as."""
        return f"stepper-{self.worker_id or 0}"

    async def step(
        self,
        input: Any,
        *,
        resources: NamedResources | None = None,
        mode: RolloutMode | None = None,
        event: StopSignal | None = None,
    ) -> Rollout:
        """Play one task, past the queue; returns its rollout as it ended. ``resources`` default to the store's latest.

        What the agent raises is stored, and raised here. The attempt is not leased: a breakpoint may take its time.
        """
        store = self.get_store()
        resources_id = None if resources is None else (await store.add_resources(resources)).resources_id
        rollout = await store.start_rollout(input, mode, resources_id)
        error = await self._play(rollout)
        if error is not None:
            raise error
        ended = await store.get_rollout_by_id(rollout.rollout_id)
        assert ended is not None
        if ended.status == "failed":
            raise AgentError(((ended.metadata or {}).get("failure") or {}).get("reason") or "the rollout failed")
        return ended

    async def iter(self, *, event: StopSignal | None = None) -> None:
        """Play what is queued, until ``event`` is set, ``max_rollouts`` were played, or it is cancelled."""
        store, played = self.get_store(), 0
        while not (event is not None and event.is_set()):
            if self.max_rollouts is not None and played >= self.max_rollouts:
                return
            rollout = await store.dequeue_rollout(self.get_worker_id(), timeout=self.poll_interval)
            if rollout is not None:
                played += 1
                async with self._alive(rollout):
                    await self._play(rollout)

    @contextlib.asynccontextmanager
    async def _alive(self, rollout: AttemptedRollout) -> AsyncIterator[None]:
        """Keep the lease while the event loop runs."""

        async def beat() -> None:
            while self.heartbeat_interval > 0:
                await asyncio.sleep(self.heartbeat_interval)
                await self.get_store().heartbeat(
                    self.get_worker_id(), [(rollout.rollout_id, rollout.attempt.attempt_id)]
                )

        heart = asyncio.create_task(beat())
        try:
            yield
        finally:
            heart.cancel()

    async def _play(self, rollout: AttemptedRollout) -> BaseException | None:
        """Play one attempt as every runner does; returns what the agent raised. Leaving the debugger leaves all."""
        store, calls = self.get_store(), CallsInTurn(self.get_agent())
        stage = Stage(
            runner=self,  # type: ignore[arg-type]
            agent=self.get_agent(),
            calls=calls,
            resources=ResourcesAsTheyAre(store, b""),
            reports=Reports(store),
            hooks=self._hooks,
        )
        await Play(stage, rollout).run()
        if isinstance(calls.error, bdb.BdbQuit):
            raise calls.error
        return calls.error


class CallsInTurn(CallsHere):
    """Calls the agent here and now, in the thread of the event loop, and keeps what it raised."""

    def __init__(self, agent: LitAgent[Any]):
        super().__init__(agent)
        self.error: BaseException | None = None

    async def call(self, rollout: AttemptedRollout, resources: NamedResources, trace: AttemptTrace) -> Any:
        """What the agent returns."""
        method, arguments = method_of(self._agent, rollout), (rollout.input, resources, rollout)
        try:
            if self._agent.is_async():
                return await method(*arguments)
            return contained(self._agent, method, *arguments)
        except BaseException as error:
            self.error = error
            raise


class ResourcesAsTheyAre(ResourceBook):
    """Resources with the keys that they were published with: there is no policy here that would ask for others."""

    def _own(self, llm: ProxyLLM, rollout: AttemptedRollout, expires: float) -> ProxyLLM:
        return llm
