"""Plays an evaluation on Ray: span store, the subject's model or a relay before its endpoint, and runners.

    folder    --vLLM, its weights as loaded (policy.loaded)--\\
                                                              main_llm --> runners --> store --> plays
    endpoint  --relay: captured, counted, limited-------------/

No trainer ranks: nothing is trained on what is played here.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning_ray.agent import FunctionalLitAgent, LitAgent, name_of
from lightning_ray.algorithms.grpo import NEUTRAL
from lightning_ray.cluster import Cluster
from lightning_ray.errors import ConfigError
from lightning_ray.evaluation.plays import POLICY, Play, Tags, calls_by_rollout, plays_of
from lightning_ray.evaluation.report import EvaluationReport
from lightning_ray.evaluation.serving import ServedModels
from lightning_ray.evaluation.settings import EvaluationSettings, Sampling
from lightning_ray.evaluation.subject import Subject
from lightning_ray.mirror.copying import send_evaluation
from lightning_ray.placement.asks import Wanted
from lightning_ray.progress import Reporter, Stage, as_current
from lightning_ray.relay.settings import Upstream
from lightning_ray.run.events import Events
from lightning_ray.run.folder import RunFolder, write_json
from lightning_ray.run.rollouts import RunRollouts
from lightning_ray.run.state import ONLY
from lightning_ray.store.base import Store
from lightning_ray.threads import in_thread
from lightning_ray.types import LLM, Dataset, EnqueueRolloutRequest

if TYPE_CHECKING:
    from lightning_ray.trainer import Trainer

EVALUATED = "evaluated"
"""The relay's name for an endpoint that is evaluated."""
PARAMETERS: dict[Sampling, dict[str, Any]] = {
    "sampled": {"temperature": 1.0},
    "greedy": {"temperature": 0.0},
    "agent": {},
}
TOLD_SECONDS = 1.0
"""Between two looks at how far it is."""
README = """# Evaluation {name}

| file | what it holds |
|---|---|
| `eval.json` | what was evaluated, the figures, and every play |
| `config.json` | the resolved settings |
| `store/` | every rollout and span: `lightning-ray spans "SELECT ..." FOLDER` |
| `events.jsonl` | parts that died, and why |

`lightning-ray doctor FOLDER` tells of every rollout, `lightning-ray eval FOLDER --against OTHER` compares two.
"""


class EvaluationSession:
    """One evaluation from start to report."""

    def __init__(self, trainer: Trainer, agent: LitAgent[Any], subject: Subject, settings: EvaluationSettings):
        self._trainer = trainer
        self._agent = agent
        self._subject = subject
        self._settings = settings
        self._sampling = settings.chosen_sampling(subject.upstream is not None)
        self._reporter = Reporter()
        self._told = subject.as_dict()

    async def run(self, tasks: Dataset[Any], data: str, folder: RunFolder, tags: Tags | None) -> EvaluationReport:
        """Play every task; returns the report, which is kept in the folder.

        Raises ConfigError for what cannot work, SwapError if the model's weights are not those of its checkpoint,
        InfrastructureError past a deadline.
        """
        self._check(tasks)
        cluster = self._cluster(folder.path.name)
        served = ServedModels(self._trainer.algorithm, self._subject, self._reporter)
        served.check(cluster.owned)
        folder.create_for_evaluation(README)
        cluster.events = Events(folder.path, self._reporter.note)
        write_json(folder.path / "config.json", {**self._trainer.resolved(), "evaluation": self._settings.model_dump()})
        began = time.perf_counter()
        try:
            store, rollouts = await self._start(cluster, served, folder)
            with self._reporter.stage(f"{len(tasks)} tasks x {self._settings.samples}") as stage, as_current(stage):
                plays = await self._play(store, rollouts, self._requests(rollouts, tasks), tags, stage)
        finally:
            await asyncio.shield(cluster.stop())
        seconds = time.perf_counter() - began
        report = EvaluationReport(folder.path, self._told, data, self._settings, self._sampling, plays, seconds)
        report.write()
        await in_thread(send_evaluation, folder.path)
        return report

    def _cluster(self, name: str) -> Cluster:
        relays = dict(self._relays())
        if self._subject.upstream is not None:
            parameters = {**self._subject.upstream.parameters, **PARAMETERS[self._sampling]}
            relays[EVALUATED] = self._subject.upstream.model_copy(update={"parameters": parameters})
        return Cluster(self._trainer.address, relays=relays, run=name, placement=self._trainer.placement)

    def _check(self, tasks: Dataset[Any]) -> None:
        if not len(tasks):
            raise ConfigError("there is no task to evaluate on (length 0); give at least one")
        needs_llm = isinstance(self._agent, FunctionalLitAgent) and "llm" in self._agent.needs
        if not self._subject.models and self._subject.upstream is None and needs_llm:
            raise ConfigError(
                f"agent {name_of(self._agent)!r} has a parameter 'llm', and there is no model to evaluate: name a run, "
                "a folder or an endpoint, or give the trainer an algorithm or initial_resources with one"
            )
        if EVALUATED in self._relays():
            raise ConfigError(f"relay {EVALUATED!r}: an evaluation needs the name for its endpoint; take another")

    async def _start(self, cluster: Cluster, served: ServedModels, folder: RunFolder) -> tuple[Store, RunRollouts]:
        settings, trainer = self._settings, self._trainer
        with self._reporter.stage("Ray and span store"):
            engines = served.engines()
            wanted = Wanted(engines, {}, trainer.runner_settings().minimum, trainer.runner_settings().maximum)
            cluster.start_ray(wanted)
            await cluster.make_room(wanted, self._reporter.note, served.folders(folder))
            store = cluster.start_store(folder.store)
            await store.statistics()
            write_json(folder.path / "ray.json", cluster.whereabouts())
        main, proof = await served.serve(cluster, folder)
        if proof:
            self._told["proof"] = proof[ONLY] if self._subject.alone else proof
        sampling = {} if self._sampling == "agent" else {**PARAMETERS[self._sampling], **NEUTRAL}
        main = {name: each.model_copy(update={"sampling_parameters": sampling}) for name, each in main.items()}
        relayed: dict[str, Any] = await cluster.start_relay()
        if EVALUATED in relayed:
            main = {"main_llm": relayed.pop(EVALUATED)}
        others = {name: value for name, value in (trainer.initial_resources or {}).items() if name not in main}
        if main:
            others = {name: value for name, value in others.items() if not isinstance(value, LLM)}
        await store.update_resources("evaluated", {**main, **relayed, **others})
        assert cluster.failure is not None
        self._agent.set_trainer(trainer)
        cluster.start_runners(self._agent, trainer.runner_settings(), trainer.hooks)
        return store, RunRollouts(store, cluster.failure, settings.timeout_seconds, settings.max_attempts)

    def _relays(self) -> dict[str, Upstream]:
        """What the relay reaches beside an endpoint that is evaluated: those of the algorithm's policies too."""
        algorithm, given = self._trainer.algorithm, self._trainer.relays
        several = self._subject.models and not self._subject.alone
        return algorithm.relays(given) if algorithm is not None and several else dict(given)

    def _requests(self, rollouts: RunRollouts, tasks: Dataset[Any]) -> list[EnqueueRolloutRequest]:
        """Every task so often, all tasks once before any twice."""
        requests = []
        for sample in range(self._settings.samples):
            for task in range(len(tasks)):
                metadata: dict[str, Any] = {"task": task, "sample": sample}
                if self._subject.models:
                    metadata |= self._versions()
                if self._settings.seed is not None:
                    metadata["seed"] = zlib.crc32(f"{self._settings.seed} {task} {sample}".encode())
                requests.append(rollouts.request(tasks[task], "val", "evaluated", metadata))
        return requests

    def _versions(self) -> dict[str, Any]:
        """Of the weights, as a run's rollouts tell it."""
        subject = self._subject
        if subject.alone:
            return {"weight_version": subject.version()}
        return {"weight_versions": {name: subject.version(name) for name in subject.models}}

    async def _play(
        self,
        store: Store,
        rollouts: RunRollouts,
        requests: Sequence[EnqueueRolloutRequest],
        tags: Tags | None,
        stage: Stage,
    ) -> list[Play]:
        """As many at once as the runners play: the deadline is of what is at work."""
        await store.enqueue_many_rollouts(requests)
        telling = asyncio.create_task(_tell(store, len(requests), stage))
        plays: list[Play] = []
        try:
            for ids in _portions([str(each.rollout_id) for each in requests], self._slots()):
                await rollouts.wait_for(ids)
                ended = await rollouts.read(ids)
                calls = calls_by_rollout(ended.spans, ended.attempts, self._settings, self._several())
                plays += plays_of(ended.episodes(), calls, tags, self._several() or self._counted())
        finally:
            telling.cancel()
        return plays

    def _several(self) -> list[str]:
        """The policies' names, where there are several."""
        return [] if self._subject.alone else list(self._subject.models)

    def _counted(self) -> tuple[str]:
        """The endpoint whose calls are the turns."""
        return (POLICY,) if self._subject.upstream is None else (EVALUATED,)

    def _slots(self) -> int:
        return self._trainer.n_runners * self._trainer.concurrency


async def _tell(store: Store, total: int, stage: Stage) -> None:
    while True:
        await asyncio.sleep(TOLD_SECONDS)
        with suppress(Exception):  # it is shown, and nothing else
            by_status = (await store.statistics())["rollouts_by_status"]
            ended = sum(by_status.get(status, 0) for status in ("succeeded", "failed", "cancelled"))
            stage.advance(ended, total, "rollouts")


def _portions(ids: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (ids[begin : begin + size] for begin in range(0, len(ids), size))
