"""One search in its surroundings: the store, the optimizing model, the run's folder, and what a person sees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_ray.algorithms.apo.candidates import Candidate
from lightning_ray.algorithms.apo.checkpoint import load, save
from lightning_ray.algorithms.apo.checks import templates_of
from lightning_ray.algorithms.apo.experiments import adapter_for_critiques
from lightning_ray.algorithms.apo.optimizer import Optimizer, note_spend, through_relay
from lightning_ray.algorithms.apo.report import row_of, write_best, write_report
from lightning_ray.algorithms.apo.scoring import Scorer
from lightning_ray.algorithms.apo.search import Search, shown
from lightning_ray.algorithms.apo.selection import Bench
from lightning_ray.algorithms.apo.state import SearchState
from lightning_ray.algorithms.apo.writer import Writer
from lightning_ray.errors import ConfigError
from lightning_ray.progress import Reporter, Stage
from lightning_ray.types import Dataset, ProxyLLM

if TYPE_CHECKING:
    from lightning_ray.algorithms.apo.settings import APO
    from lightning_ray.run.run import Run


class Session:
    """See the module. Without a run there is a store alone: nothing is kept, shown, or relayed."""

    def __init__(self, settings: APO[Any], run: Run | None, train: Dataset[Any], val: Dataset[Any]):
        self._settings = settings
        self._run = run
        self._reporter = Reporter(Console(quiet=True)) if run is None else run.reporter
        self._resources = dict(settings.get_initial_resources() or {})
        self._optimizer = self._relayed()
        self._templates = templates_of(self._resources)
        self._resumes = run is not None and settings.get_trainer().resume
        self.state = self._begin(len(val))
        settings._outcome.state = self.state
        self._stage: Stage | None = None
        self._scorer = Scorer(settings.get_store(), settings, self.state, self._resources, self._progress)
        self._train = train
        self._val = val
        self._logged = self.state.round
        """The last round whose figures the trackers have."""

    async def search(self) -> None:
        """All rounds, those that are left of a run that is resumed."""
        if self._resumes:
            await self._scorer.cancel_leftovers()
        async with self._client() as client:
            search = self._make(client)
            if self._settings.run_initial_validation and self.state.best_score is None:
                with self._reporter.stage(f"seed on {len(self._val)} tasks") as self._stage:
                    self._scorer.begin()
                    await search.validate_seed()
                    self._stage.suffix = f"  score {shown(self.state.seed_score)}"
                await self._keep()
            while not search.over():
                number = f"round {self.state.round + 1}/{self._settings.beam_rounds}"
                with self._reporter.stage(number) as self._stage:
                    self._scorer.begin()
                    self._stage.suffix = f"  {await search.play_round()}"
                await self._keep()
            await self._keep()
        self._tell_end()

    def _begin(self, val_tasks: int) -> SearchState:
        """Where the run was, or the seed. Raises ConfigError if the run had other templates or tasks."""
        if not self._resumes:
            state = SearchState(val_tasks=val_tasks)
            state.add(Candidate(version="v0", templates=self._templates))
            state.beam = ["v0"]
            return state
        assert self._run is not None
        state = load(self._run.folder)
        seed = state.candidates["v0"].templates
        if not state.candidates["v0"].same_templates(self._templates):
            raise ConfigError(
                f"--resume: the run began with other templates ({sorted(seed)}) than initial_resources have now "
                f"({sorted(self._templates)}, or their text differs); give those, or start a run of another name"
            )
        if state.val_tasks != val_tasks:
            raise ConfigError(
                f"--resume: val_dataset has {val_tasks} tasks, and had {state.val_tasks} when the run began; give the "
                "same, or start a run of another name"
            )
        self._run.folder.truncate_metrics(state.round)
        state.stopped = None
        return state

    def _make(self, client: Any) -> Search:
        settings = self._settings
        optimizer = Optimizer(
            client,
            settings.diversity_temperature,
            settings.optimizer_calls_at_once,
            settings.optimizer_timeout_seconds,
            self.state.usage,
        )
        writer = Writer(optimizer, settings)
        bench = Bench(settings, self.state, self._scorer, writer, self._train, self._val)
        return Search(bench, adapter_for_critiques(settings.get_adapter()), self._reporter.note)

    def _relayed(self) -> ProxyLLM | None:
        """The relay's endpoint that optimises; the agents do not get it."""
        if self._settings.optimizer is None:
            return None
        llm = self._resources.pop(self._settings.optimizer, None)
        if self._run is None or not isinstance(llm, ProxyLLM):
            raise ConfigError(
                f"optimizer={self._settings.optimizer!r} needs a run with relays: Trainer(relays=...).fit(...)"
            )
        return llm

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        if self._optimizer is None:
            yield self._settings.async_openai_client
            return
        assert self._run is not None
        async with through_relay(self._settings.get_store(), self._optimizer, self._run.cluster.secret) as client:
            yield client

    async def _keep(self) -> None:
        """Checkpoint, report, best templates and figures, as of now."""
        if self._run is None:
            return
        if self._optimizer is not None:
            await note_spend(self.state.usage, self._optimizer, self._run.cluster.secret)
        folder, state = self._run.folder, self.state
        save(folder, state)
        write_best(folder.path, state)
        write_report(folder.path, state, self._settings.settings())
        if self._logged < state.round:
            self._logged = state.round
            self._run.trackers.log(row_of(state))

    def _progress(self, ended: int, queued: int) -> None:
        if self._stage is not None:
            best = f"best {shown(self.state.best_score)}, {queued - ended} rollouts left"
            self._stage.advance(ended, queued, f"rollouts, {best}")

    def _tell_end(self) -> None:
        state = self.state
        if state.stopped is not None:
            self._reporter.note(f"stopped after round {state.round}: {state.stopped}")
        before, after = shown(state.seed_score), shown(state.best_score)
        self._reporter.note(f"best prompt: {state.best}, score {after} (the seed's {before})")
