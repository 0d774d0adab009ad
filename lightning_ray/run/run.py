"""One training run: what an algorithm works with.

Offers data, rollouts, policies under training, validation, checkpoints and reports; which of them, when, is the
algorithm's business. What is of one policy alone is ``trained_policy``'s, and rollouts are ``rollouts``'. Every
rollout of every step ends in an account; every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_ray.agent import LitAgent
from lightning_ray.algorithms.source import Played
from lightning_ray.algorithms.weights import WeightAlgorithm
from lightning_ray.cluster import Cluster
from lightning_ray.config import RunnerSettings
from lightning_ray.evaluation import Evaluation
from lightning_ray.hooks import Hook
from lightning_ray.machine import tree_memory
from lightning_ray.metrics.watch import RunWatch, Watched
from lightning_ray.mirror.mirror import Mirror
from lightning_ray.policy.loaded import loaded_from
from lightning_ray.progress import Reporter
from lightning_ray.run.evaluations import RunEvaluations
from lightning_ray.run.events import Events
from lightning_ray.run.folder import RunFolder, write_json
from lightning_ray.run.lateness import Lateness, Look, replicas_at_work, rollouts_at_work, runners_at_work
from lightning_ray.run.models import given_models, initial_models, publish_resources, wanted_by
from lightning_ray.run.policy_rows import by_policy
from lightning_ray.run.rollouts import RunRollouts, refuse_total_failure
from lightning_ray.run.state import ONLY, RunState
from lightning_ray.run.step_figures import StepTimes, policy_figures, step_figures
from lightning_ray.run.trained_policy import TrainedPolicy
from lightning_ray.stopping import Stop
from lightning_ray.store.base import Store
from lightning_ray.threads import in_thread
from lightning_ray.together import together
from lightning_ray.traces.training import StepTold, append_training_spans
from lightning_ray.trackers import Choice, Trackers
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode
from lightning_ray.types import Dataset, EnqueueRolloutRequest, ProxyLLM, RolloutMode


class Run:
    """See the module. ``settings`` are the algorithm's."""

    def __init__(
        self,
        folder: RunFolder,
        reporter: Reporter,
        cluster: Cluster,
        agent: LitAgent[Any],
        datasets: dict[str, Dataset[Any]],
        runners: RunnerSettings,
        resume: bool,
        hooks: Sequence[Hook] = (),
        trackers: Sequence[Choice] = (),
    ):
        self.folder = folder
        self.reporter = reporter
        self.trackers = Trackers(folder.path, reporter.note, trackers)
        self.cluster = cluster
        self.events = cluster.events = Events(folder.path, reporter.note)
        self.mirror: Mirror | None = None
        """Of a run at a URL."""
        self.stop = Stop()
        self.agent = agent
        self.datasets = datasets
        self.train_dataset = datasets["train"]
        self.state = RunState()
        self.store: Store
        self.policies: dict[str, TrainedPolicy] = {}
        self.peak_memory = 0
        self._runners = runners
        self._hooks = hooks
        self._resume = resume
        self._began = time.perf_counter()
        self._seconds_before = 0.0
        self._settings: WeightAlgorithm
        self._rollouts: RunRollouts
        self._watch: asyncio.Task[None] | None = None
        self._agents: dict[str, set[str]] = {}
        """By rollout read since the last step, the agents that took part."""
        self._evaluations = RunEvaluations(self)
        self._lateness = Lateness(self.events.waiting, self._looks())
        self._done = threading.Event()

    @property
    def policy(self) -> TrainedPolicy:
        """The only policy."""
        [policy] = self.policies.values()
        return policy

    # Starting

    async def start(self, settings: WeightAlgorithm) -> None:
        """Bring up everything, publish the first weights, and evaluate before the first step."""
        self._settings = settings
        self._lateness.start()
        threading.Thread(target=self._sample_memory, daemon=True).start()
        with self.reporter.stage("Ray and span store"):
            await self._start_store(settings)
        trained, frozen = settings.trained(), settings.frozen()
        if self._resume:
            self.state = RunState.of(self.folder.read_state())
            self._seconds_before = self.state.seconds
            self.state.check_policies(trained)
            self.folder.truncate_metrics(self.state.step)
        models = await initial_models({**trained, **frozen}, self.folder, self._resume, self.reporter)
        await self._mirrored("the model")  # from where other nodes get it
        self.policies = {
            name: TrainedPolicy(
                self.cluster, own, self.state.policy(name), self.reporter.note, name, self._rollouts.interrupt
            )
            for name, own in trained.items()
        }
        with self.reporter.stage("engine and trainer up" if len(models) == 1 else "engines and trainers up"):
            starting = [policy.start(models[name]) for name, policy in self.policies.items()]
            starting += [self._serve(name, own, models[name]) for name, own in frozen.items()]
            endpoints = dict(zip(models, await together(*starting), strict=True))
            relayed = await self.cluster.start_relay()
        await publish_resources(self.store, endpoints, relayed)
        with self.reporter.stage("first weights proved"):
            latest = self.folder.latest_checkpoint() if self._resume else None
            await together(*(policy.connect(latest) for policy in self.policies.values()))
            for policy in self.policies.values():
                policy.watch()
            self.cluster.start_runners(self.agent, self._runners, self._hooks)
            self._watch = asyncio.create_task(RunWatch(self._watched()).run())
        if not self._resume:
            await self._evaluations.all("before")
        self.reporter.start_steps(self.state.step, settings.steps)
        self._lateness.step(self.state.step)
        if self.state.seconds_to_first_step is None:
            self.state.seconds_to_first_step = self.elapsed()

    async def _start_store(self, settings: WeightAlgorithm) -> None:
        wanted = wanted_by(settings, self._runners)
        self.cluster.start_ray(wanted)
        folders = {"the run's folder": self.folder.path} if self.mirror is None else {}
        await self.cluster.make_room(wanted, self.reporter.note, {**folders, **given_models(settings)})
        self.store = self.cluster.start_store(self.folder.store, settings.store_shards)
        await self.store.statistics()
        write_json(self.folder.path / "ray.json", self.cluster.whereabouts())
        assert self.cluster.failure is not None
        limits = settings.rollout_timeout_seconds, settings.max_attempts
        self._rollouts = RunRollouts(self.store, self.cluster.failure, *limits)
        await self._rollouts.cancel_leftovers()

    async def _serve(self, name: str, own: WeightAlgorithm, model: Path) -> ProxyLLM:
        """Serve a model that is not trained, under the weights of its folder."""
        loaded = loaded_from(model, 0, own.engine.chosen_tolerance)
        return await self.cluster.start_policy(model, own.model_name, own.engine, loaded, name)

    async def restart_trainers(self, reason: str) -> None:
        """Start the trainer ranks anew from the last checkpoint, or from the initial model, and publish its weights
        under the next version; engine and runners go on. The run's state goes back to that checkpoint.
        """
        before = self.state
        self.reporter.note(f"the trainer ranks are started anew: {reason}")
        for policy in self.policies.values():
            policy.trainers.stop()
        await self._mirrored("the last checkpoint")  # from where other nodes get it
        latest = self.folder.latest_checkpoint()
        if latest is not None:
            self.state = RunState.of(self.folder.read_state())
        else:
            self.state = RunState(evaluations=before.evaluations, seconds_to_first_step=before.seconds_to_first_step)
        self.state.trainer_restarts = before.trainer_restarts + 1
        self.folder.truncate_metrics(self.state.step)
        states = self.state.policy
        await together(*(policy.restart(latest, states(name)) for name, policy in self.policies.items()))
        self._rollouts.resume()
        self.reporter.start_steps(self.state.step, self._settings.steps)

    # Rollouts

    async def play_groups(
        self, tasks: Sequence[Any], group_size: int, sampled: bool
    ) -> tuple[list[Episode], dict[str, str]]:
        """Play every task ``group_size`` times; returns the episodes and rollout id -> group id."""
        group_of: dict[str, str] = {}
        requests = []
        for task in tasks:
            group_id = f"gr-{uuid.uuid4().hex[:12]}"
            for _ in range(group_size):
                request = self.request(task, "train", "sampled" if sampled else "greedy", {"group_id": group_id})
                requests.append(request)
                group_of[str(request.rollout_id)] = group_id
        return await self.play(requests), group_of

    def request(
        self, task: Any, mode: RolloutMode, resources_id: str, metadata: dict[str, Any]
    ) -> EnqueueRolloutRequest:
        """What queues one rollout of a task, under the run's limits and an id of its own."""
        versions = {name: policy.version for name, policy in self.policies.items()}
        known = {"weight_versions": versions} if self._several else {"weight_version": self.policy.version}
        return self._rollouts.request(task, mode, resources_id, {**metadata, **known})

    async def play(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Episode]:
        """Queue rollouts, wait for their end, and read them back."""
        queued = await self.store.enqueue_many_rollouts(requests)
        rollout_ids = [rollout.rollout_id for rollout in queued]
        await self.wait_for(rollout_ids)
        return await self.read(rollout_ids)

    async def wait_for(self, rollout_ids: Sequence[str]) -> None:
        """Return when all rollouts have ended. Raises InfrastructureError past the deadline that their own limits
        set, or when the runners fail.
        """
        await self._rollouts.wait_for(rollout_ids)

    async def read(self, rollout_ids: Sequence[str]) -> list[Episode]:
        """The episodes of rollouts that have ended, in the order of their ids; of several policies with all calls."""
        ended = await self._rollouts.read(rollout_ids)
        self._agents |= ended.agents()
        return ended.episodes(self._settings.agent_match)

    async def read_shares(self, rollout_ids: Sequence[str]) -> dict[str, list[Episode]]:
        """The episodes of rollouts that have ended as each policy under training has them: with its own calls alone,
        and its own reward.
        """
        ended = await self._rollouts.read(rollout_ids)
        self._agents |= ended.agents()
        return {
            name: ended.episodes(policy.settings.agent_match, name if self._several else None)
            for name, policy in self.policies.items()
        }

    @property
    def _several(self) -> bool:
        """Whether policies go by names."""
        return list(self.policies) != [ONLY]

    # Learning

    async def update(self, batch: pa.Table) -> dict[str, Any]:
        """One update of the only policy; see ``TrainedPolicy``."""
        return await self.policy.update(batch)

    def check_tokens(self, account: Account, max_staleness: int) -> None:
        """Count tokens of the only policy that must not be trained; see ``TrainedPolicy``."""
        self.policy.check_tokens(account, max_staleness)

    async def publish(self, version: int) -> None:
        """Swap the weights of the only policy on every replica, and prove it."""
        await self.policy.publish(version)

    def record_step(self, step: int, played: Played, updates: Mapping[str, dict[str, Any]], times: StepTimes) -> None:
        """Account for a step and show it. ``updates`` has the figures of the policies that were trained."""
        state = self.state
        refuse_total_failure(played.episodes)
        state.step = step + 1
        state.rollouts += len(played.episodes)
        state.step_seconds.append(times.whole)
        figures: dict[str, dict[str, Any]] = {}
        for name, policy in self.policies.items():
            share, update = played.shares[name], updates.get(name, {})
            policy.count(share.episodes, share.account, update)
            swap = policy.swapper.last if update else None
            own = policy_figures(share.episodes, share.account, update, swap, times)
            figures[name] = {**own, "weight_version": policy.version}
        row = {
            **step_figures(step, played.episodes, times, self._agents),
            **(by_policy(figures) if self._several else figures[ONLY]),
            "validation": self._evaluations.last,
            "trainer_restarts": state.trainer_restarts,
        }
        self._agents.clear()
        self.trackers.log(row)
        self.reporter.step(row, self._evaluations.last)
        self._lateness.step(state.step, times.whole)
        if self.mirror is not None:
            self.mirror.tell()

    async def trace_step(self, step: int, played: Played, times: StepTimes) -> None:
        """Tell in the traces of a step's rollouts what became of them."""
        versions = {name: policy.version for name, policy in self.policies.items()}
        learning = sum(times.phases.get(phase, 0.0) for phase in ("update", "swap"))
        now = time.time()
        await append_training_spans(self.store, played, StepTold(step, versions, now - learning, now))

    async def validate(self) -> Evaluation | None:
        """Greedy pass over val_dataset; its figures, None without one."""
        return await self._evaluations.validate()

    # Keeping and ending

    async def checkpoint(self) -> None:
        """Save model, optimizer and run state, atomically. Of a run at a URL the last one is there by then."""
        if self.mirror is not None:
            await self.mirror.settled("the last checkpoint")
        writing = self.folder.begin_checkpoint(self.state.step)
        for policy in self.policies.values():
            await policy.save(writing)
            if self.mirror is not None:
                await policy.hand_over(writing, self.folder.checkpoint(self.state.step))
        self.state.seconds = self.elapsed()
        self.folder.commit_checkpoint(writing, self.state.step, asdict(self.state))
        if self.mirror is not None:
            self.mirror.ask()

    async def finish(self) -> None:
        """Evaluate after the last step, write the summary, show the table."""
        self.reporter.end_steps()
        await self._evaluations.all("after")
        self.folder.plot()
        from lightning_ray.run.summary import summarize, summary_table

        summary = summarize(self.state, self.elapsed(), self.peak_memory, self.folder.metrics())
        write_json(self.folder.path / "summary.json", summary)
        columns, rows = summary_table(self.state)
        if rows:
            self.reporter.table("before and after", columns, rows)
        self.reporter.note(f"everything is in {self.folder.path}")

    async def close(self) -> None:
        """End what the run started."""
        self._done.set()
        self._lateness.stop()
        self.reporter.end_steps()
        for policy in self.policies.values():
            policy.close()
        if self._watch is not None:
            self._watch.cancel()
        await in_thread(self.trackers.close)
        await self.cluster.stop()
        try:
            await in_thread(self.folder.plot_interrupted)
        except Exception as error:  # what ended the run matters more
            self.reporter.note(f"reward.png and training.png could not be drawn: {error}")
        if self.mirror is not None:
            await self.mirror.finish()

    async def _mirrored(self, what: str) -> None:
        """Wait until what is in the folder is at the run's URL, if it has one."""
        if self.mirror is not None:
            self.mirror.ask()
            await self.mirror.settled(what)

    def elapsed(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._began

    def _watched(self) -> Watched:
        """The run, for its metrics."""
        pool = self.cluster.runners
        assert pool is not None
        return Watched(
            name=self.folder.path.name,
            folder=self.folder.path,
            store=self.store,
            step=lambda: self.state.step,
            runners=lambda: sum(runner["pid"] is not None for runner in pool.status()),
            restarts=lambda: {"runner": pool.restarts, "trainer": self.state.trainer_restarts},
            replicas=lambda: {name: policy.swapper.present for name, policy in self.policies.items()},
            bounds={name: policy.settings.max_staleness for name, policy in self.policies.items()},
            stores=self.cluster.store_processes,
        )

    def _looks(self) -> dict[str, Look]:
        """What each part is at, for when a step is late."""

        async def rollouts() -> str:
            return "no store yet" if self.cluster.store is None else await rollouts_at_work(self.cluster.store)

        async def runners() -> str:
            pool = self.cluster.runners
            return "not started" if pool is None else runners_at_work(pool.status())

        async def replicas() -> str:
            served = self.cluster.applications
            asked = [served.replicas_of(name)("status") for name in self.policies if served.serves(name)]
            return replicas_at_work([each for answers in await asyncio.gather(*asked) for each in answers])

        return {"rollouts": rollouts, "runners": runners, "replicas": replicas}

    def _sample_memory(self) -> None:
        while not self._done.wait(4.0):
            self.peak_memory = max(self.peak_memory, tree_memory())
