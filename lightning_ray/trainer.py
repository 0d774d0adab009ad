"""Trainer: what a user calls. Checks what it is given, makes the run, and lets the algorithm learn.

The same call works in a plain script, through ``lightning-ray train`` and inside a submitted Ray job.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from lightning_ray.agent import LitAgent
from lightning_ray.algorithms.base import Algorithm
from lightning_ray.components import Spec, build_component
from lightning_ray.config import RunnerSettings
from lightning_ray.errors import ConfigError
from lightning_ray.hooks import Hook
from lightning_ray.launch import current_launch
from lightning_ray.mirror import run_place
from lightning_ray.placement.settings import Placement
from lightning_ray.relay.settings import Upstream, check_upstreams
from lightning_ray.stopping import Stop, Stopped, run_interruptibly, stoppable
from lightning_ray.tracing import OtelTracer, Tracer
from lightning_ray.trackers.choice import Choice, check_installed, check_trackers, name_of
from lightning_ray.types import Dataset, NamedResources

if TYPE_CHECKING:
    from lightning_ray.adapters import TraceAdapter
    from lightning_ray.dev import DevRollout
    from lightning_ray.evaluation.report import EvaluationReport
    from lightning_ray.evaluation.request import EvaluationRequest
    from lightning_ray.evaluation.settings import EvaluationSettings
    from lightning_ray.evaluation.subject import Of
    from lightning_ray.store.base import Store

T = TypeVar("T")
CONCURRENCY = 64
CONCURRENCY_OF_PROCESSES = 8


class Trainer:
    """Trains an agent with an algorithm.

    Args:
        algorithm: how to learn; ``dev`` has one of its own. Like adapter, tracer and store an instance, or what makes
            one: a class, a factory, a dotted name, a mapping with "type".
        n_runners: Ray actors that play rollouts.
        max_runners: how many there may be while more is queued than they can play; by default no more.
        concurrency: rollouts that one runner plays at once; by default 64, or 8 in processes of their own.
        isolation: ``"process"`` plays each attempt in a process of its own: agents may crash.
        python: the interpreter of another environment (``env/bin/python``), which plays the agent in processes of its
            own; there are lightning-ray's base dependencies and the agent's own.
        name: of the run; its folder is ``runs_dir/name``.
        runs_dir: where runs are kept: a folder, or a URL (``s3://bucket/runs``) to which they are mirrored as they go
            (docs/jobs.md).
        address: of a Ray cluster; by default RAY_ADDRESS, or a Ray of the run's own on this machine.
        placement: where parts go on the cluster, by labels of its nodes; by default where they belong.
        initial_resources: what agents get before anything was learned, for algorithms that ask for it.
        relays: other models that agents call, by name, as ``{"judge": lr.Upstream(base_url=...)}``.
        hooks: called at four moments of every rollout.
        trackers: where figures go beside metrics.jsonl, TensorBoard and Ray's metrics: "wandb", "mlflow", or objects
            with ``log(row)`` and ``close()``.
        adapter: what algorithms get to turn spans into something to learn from.
        tracer: what hooks and agents see as their tracer.
        store: where ``dev`` keeps rollouts and spans; a run has its own.
        llm_proxy: handed to algorithms that ask for it.
        max_rollouts: after how many ``dev`` stops.
        strategy, dev: of Agent Lightning 0.3; accepted, and without effect, but for a strategy's ``n_runners``.
    """

    def __init__(
        self,
        *,
        algorithm: Spec[Algorithm] | None = None,
        n_runners: int = 2,
        max_runners: int | None = None,
        concurrency: int | None = None,
        isolation: Literal["process"] | None = None,
        python: str | Path | None = None,
        name: str = "run",
        runs_dir: str | Path = "runs",
        address: str | None = None,
        placement: Placement | Mapping[str, Any] | None = None,
        initial_resources: NamedResources | None = None,
        relays: Mapping[str, Upstream] | None = None,
        hooks: Hook | Sequence[Hook] | None = None,
        trackers: Sequence[Choice] = (),
        adapter: Spec[TraceAdapter[Any]] | None = None,
        tracer: Spec[Tracer] | None = None,
        store: Spec[Store] | None = None,
        llm_proxy: Any = None,
        max_rollouts: int | None = None,
        strategy: Any = None,
        dev: bool = False,
        **unknown: Any,
    ):
        refuse_unknown(unknown)
        if isinstance(strategy, Mapping) and "n_runners" in strategy:
            n_runners = strategy["n_runners"]
        elif strategy is not None:
            warnings.warn(f"strategy={strategy!r} has no effect: Ray places and runs everything", stacklevel=2)
        if dev:
            warnings.warn("Trainer(dev=True) has no effect; call Trainer.dev(...)", DeprecationWarning, stacklevel=2)
        launch = current_launch()
        isolation = isolation if python is None else isolation or "process"
        if concurrency is None:
            concurrency = CONCURRENCY if isolation is None else CONCURRENCY_OF_PROCESSES
        if n_runners < 1 or concurrency < 1:
            raise ConfigError(f"n_runners={n_runners}, concurrency={concurrency}: both must be at least 1")
        if isolation not in (None, "process"):
            raise ConfigError(f"isolation={isolation!r}: it is 'process', or None for agents that share a process")
        self.algorithm: Algorithm | None = launch.apply(
            build_component(algorithm, expected_type=Algorithm, spec_name="algorithm")
        )
        self.n_runners = launch.setting("n_runners", n_runners)
        self.max_runners = launch.setting("max_runners", self.n_runners if max_runners is None else max_runners)
        self.concurrency = launch.setting("concurrency", concurrency)
        self.isolation = isolation
        self.python = None if python is None else str(python)
        if self.max_runners < self.n_runners:
            raise ConfigError(f"max_runners={self.max_runners}: it is at least n_runners={self.n_runners}")
        self.folder = run_place(launch.runs_dir or runs_dir, launch.name or name)
        """Of a run at a URL its local place."""
        self.address = address
        self.placement = launch.placement(placement)
        self.resume = launch.resume
        self.initial_resources = initial_resources
        check_upstreams(relays or {})
        self.relays = launch.upstreams(relays or {})
        self.hooks = [hooks] if isinstance(hooks, Hook) else list(hooks or ())
        self.trackers = check_trackers(launch.names("trackers", trackers))
        self.tracer = build_component(tracer, expected_type=Tracer, spec_name="tracer") or OtelTracer()
        self.store: Store | None = None if store is None else store_of(store)
        self.llm_proxy = llm_proxy
        self.max_rollouts = max_rollouts
        self._evaluation = launch.evaluation
        self._stop: Stop | None = None
        self._adapter = None if adapter is None else adapter_of(adapter)
        launch.refuse_leftovers()

    @cached_property
    def adapter(self) -> TraceAdapter[Any]:
        """The adapter that was given, otherwise a TracerTraceToTriplet."""
        return self._adapter if self._adapter is not None else adapter_of({})

    def fit(
        self,
        agent: LitAgent[T],
        train_dataset: Dataset[T] | None = None,
        *,
        val_dataset: Dataset[T] | None = None,
        test_dataset: Dataset[T] | None = None,
    ) -> dict[str, Any]:
        """Train; returns what summary.json holds.

        ``val_dataset`` is played before, during and after the training, ``test_dataset`` before and after.
        Raises LightningRayError with a message that names the thing, its value and the fix; KeyboardInterrupt after
        an orderly end.
        """
        datasets: dict[str, Dataset[Any]] = {"train": [] if train_dataset is None else train_dataset}
        for split, data in (("val", val_dataset), ("test", test_dataset)):
            if data is not None and len(data):
                datasets[split] = data
        with stoppable(lambda: self._stop is not None and self._stop.ask()):
            if self._evaluation is not None:
                self._evaluate_instead(self._evaluation, agent, datasets)
            try:
                return run_interruptibly(self._fit(agent, datasets))
            except Stopped:
                raise KeyboardInterrupt from None

    def validate(
        self,
        agent: LitAgent[T],
        val_dataset: Dataset[T],
        *,
        of: Of = None,
        settings: EvaluationSettings | None = None,
        tags: Callable[[T], Iterable[str]] | None = None,
        name: str | None = None,
    ) -> EvaluationReport:
        """Evaluate: play every task with some model, on Ray, without training; prints a table.

        Args:
            of: the model. A run's folder (its latest checkpoint; ``"runs/sql@best"``, ``@initial`` and ``@30`` name
                others), any folder with a Hugging Face model, or an ``lr.Upstream`` for an endpoint, whose calls are
                captured and counted. By default what the trainer has: the latest checkpoint of its run, otherwise its
                algorithm's model, otherwise the LLM of its initial resources.
            settings: samples of each task, greedy or sampled, what counts as a success, prices.
            tags: of a task, by which the reward is told too; by default its ``tags`` and ``tag``.
            name: of the folder in ``runs_dir``, which keeps ``eval.json`` and every span; by default the run's name
                and ``-eval``.

        Raises LightningRayError with a message that names the thing, its value and the fix.
        """
        from lightning_ray.evaluation.request import evaluate_subject
        from lightning_ray.evaluation.settings import EvaluationSettings
        from lightning_ray.progress import Reporter

        check_agent(agent)
        with stoppable():
            report = evaluate_subject(
                self, agent, val_dataset, of, settings or EvaluationSettings(), name=name, tags=tags
            )
        report.show(Reporter().console)
        return report

    def _evaluate_instead(
        self, request: EvaluationRequest, agent: LitAgent[Any], datasets: dict[str, Dataset[Any]]
    ) -> NoReturn:
        from lightning_ray.evaluation.request import Evaluated

        check_agent(agent)
        request.answer(self, agent, datasets)
        raise Evaluated

    def dev(
        self,
        agent: LitAgent[T],
        train_dataset: Dataset[T] | None = None,
        *,
        val_dataset: Dataset[T] | None = None,
        tasks: int | None = None,
        folder: str | Path | None = None,
    ) -> list[DevRollout]:
        """Try an agent out on the first ``tasks`` (10) of each data set, in this process, without Ray and GPU.

        The model is what ``initial_resources`` say, any endpoint will do. Agents are called in this thread, one
        rollout after the other: breakpoints work. Prints a table, and returns the rollouts with their spans.
        ``folder`` keeps the store, for ``lightning-ray spans`` and ``doctor``; by default it is gone afterwards.
        """
        from lightning_ray.dev import TASKS, FirstOf, check_resources, dev_algorithm, develop, show

        check_agent(agent)
        if missing := sorted(set(self.relays) - set(self.initial_resources or {})):
            raise ConfigError(f"dev() starts no relay: give an lr.LLM for {', '.join(missing)} by initial_resources")
        dev_algorithm(self.algorithm)
        check_resources(agent, self)
        count = TASKS if tasks is None else tasks
        datasets = [data if data is None else FirstOf(data, count) for data in (train_dataset, val_dataset)]
        played = run_interruptibly(develop(self, agent, datasets, None if folder is None else Path(folder)))
        show(played)
        return played

    async def _fit(self, agent: LitAgent[Any], datasets: dict[str, Dataset[Any]]) -> dict[str, Any]:
        from lightning_ray.algorithms.fast import Baseline
        from lightning_ray.algorithms.over_store import attach
        from lightning_ray.cluster import Cluster
        from lightning_ray.dev import check_resources
        from lightning_ray.mirror.mirror import Mirror
        from lightning_ray.mirror.taking_up import take_up
        from lightning_ray.progress import Reporter
        from lightning_ray.run.folder import RunFolder, write_json
        from lightning_ray.run.run import Run

        check_agent(agent)
        if self.algorithm is None:
            raise ConfigError("fit() needs an algorithm: Trainer(algorithm=lr.GRPO(...)); dev() has one of its own")
        if self.store is not None:
            raise ConfigError(f"store={self.store!r}: a run keeps its rollouts in a store of its own; give it to dev()")
        if isinstance(self.algorithm, Baseline) and not self.relays:
            check_resources(agent, self)
        folder, reporter = RunFolder(self.folder), Reporter()
        run = Run(
            folder,
            reporter,
            Cluster(
                self.address,
                relays=self.algorithm.relays(self.relays),
                run=folder.path.name,
                placement=self.placement,
            ),
            agent,
            datasets,
            self.runner_settings(),
            self.resume,
            self.hooks,
            self.trackers,
        )
        self._stop = run.stop
        agent.set_trainer(self)
        attach(self.algorithm, self)
        check_installed(self.trackers)
        self.algorithm.check(run)
        claim = await asyncio.to_thread(take_up, folder, self.resume, reporter.note)
        try:
            write_json(folder.path / "config.json", self.resolved())
            run.mirror = Mirror.of(folder.path, claim, reporter.note)
            try:
                await self.algorithm.learn(run)
            finally:
                await asyncio.shield(run.close())
        finally:
            claim.release()
        if run.mirror is not None:
            run.mirror.verify()
        import json

        summary: dict[str, Any] = json.loads((folder.path / "summary.json").read_text())
        return summary

    def runner_settings(self) -> RunnerSettings:
        """How runners play."""
        return RunnerSettings(
            minimum=self.n_runners,
            maximum=self.max_runners,
            concurrency=self.concurrency,
            isolation=self.isolation,
            python=self.python,
        )

    def resolved(self) -> dict[str, Any]:
        """All settings, as config.json keeps them."""
        algorithm = self.algorithm
        shown: dict[str, Any] = {
            "algorithm": algorithm and {"name": type(algorithm).__name__, **algorithm.settings()},
            "n_runners": self.n_runners,
            "max_runners": self.max_runners,
            "concurrency": self.concurrency,
            "isolation": self.isolation,
            "python": self.runner_settings().python,
            "address": self.address,
        }
        if placement := self.placement.model_dump(exclude_unset=True):
            shown["placement"] = placement
        if self.relays:
            shown["relays"] = {name: upstream.model_dump(mode="json") for name, upstream in self.relays.items()}
        if self.trackers:
            shown["trackers"] = [name_of(choice) for choice in self.trackers]
        return shown


def adapter_of(spec: Spec[TraceAdapter[Any]]) -> TraceAdapter[Any]:
    """The adapter that is meant; a mapping without a type has a TracerTraceToTriplet's arguments."""
    from lightning_ray.adapters import TraceAdapter, TracerTraceToTriplet

    made = build_component(spec, expected_type=TraceAdapter, spec_name="adapter", dict_default_cls=TracerTraceToTriplet)
    assert made is not None
    return made


def store_of(spec: Spec[Store]) -> Store:
    """The store that is meant."""
    from lightning_ray.store.base import Store

    made = build_component(spec, expected_type=Store, spec_name="store")  # type: ignore[type-abstract]
    assert made is not None
    return made


def check_agent(agent: Any) -> None:
    """Raises ConfigError for what is no agent."""
    if not isinstance(agent, LitAgent):
        raise ConfigError(
            f"agent is {type(agent).__name__} {agent!r:.60}; decorate the function with @lightning_ray.rollout, or "
            "subclass LitAgent"
        )


RENAMED = {
    "n_workers": "n_runners",
    "max_tasks": "max_rollouts",
    "triplet_exporter": "adapter",
    "trainer": "algorithm",
    "log_dir": "runs_dir",
}
"""Names of older versions -> ours."""


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raises ConfigError naming an argument that Trainer does not have, and the nearest that it has."""
    known = [name for name in inspect.signature(Trainer).parameters if name != "unknown"]
    for name, value in arguments.items():
        close = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise ConfigError(f"Trainer({name}={value!r:.60}): there is no such argument; {hint}")
