"""One training run: what an algorithm works with.

Offers data, rollouts, policies under training, validation, checkpoints and reports; which of them, when, is the
algorithm's business. What is of one policy alone is ``trained_policy``'s, and rollouts are ``run_rollouts``'. Every
rollout of every step ends in an account; every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_ray.agent import LitAgent
from lightning_ray.algorithms.grpo import NEUTRAL
from lightning_ray.algorithms.weights import WeightAlgorithm
from lightning_ray.cluster import Cluster, tree_memory
from lightning_ray.config import RunnerSettings
from lightning_ray.evaluation import Evaluation, evaluate
from lightning_ray.hooks import Hook
from lightning_ray.progress import Reporter, as_current
from lightning_ray.run_folder import RunFolder, write_json
from lightning_ray.run_rollouts import RunRollouts, refuse_total_failure
from lightning_ray.run_state import RunState
from lightning_ray.step_figures import StepTimes, step_figures
from lightning_ray.store.base import Store
from lightning_ray.threads import in_thread
from lightning_ray.trackers import Choice, Trackers
from lightning_ray.trackers.ray_metrics import watch_queue
from lightning_ray.trained_policy import TrainedPolicy
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode
from lightning_ray.types import Dataset, EnqueueRolloutRequest, RolloutMode

ONLY = "policy"
"""Name of the policy where there is one alone."""
RESOURCES = {"sampled": {"temperature": 1.0, **NEUTRAL}, "greedy": {"temperature": 0.0, **NEUTRAL}}
"""Resources by id: the policy, sampled from as it is, and its most likely tokens."""


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
        self._settings: WeightAlgorithm
        self._rollouts: RunRollouts
        self._queue_watch: asyncio.Task[None] | None = None
        self._agents: dict[str, set[str]] = {}
        """By rollout read since the last step, the agents that took part."""
        self._validation: float | None = None
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
        threading.Thread(target=self._sample_memory, daemon=True).start()
        with self.reporter.stage("Ray and span store"):
            await self._start_store(settings)
        if self._resume:
            self.state = RunState.of(self.folder.read_state())
            self.folder.truncate_metrics(self.state.step)
        model = await self._model(settings)
        self.policies = {ONLY: TrainedPolicy(self.cluster, settings, self.state.policy(ONLY), self.reporter.note)}
        with self.reporter.stage("engine and trainer up"):
            endpoint = await self.policy.start(model)
            relayed = await self.cluster.start_relay()
        for name, sampling in RESOURCES.items():
            resource = endpoint.model_copy(update={"sampling_parameters": sampling})
            await self.store.update_resources(name, {"main_llm": resource, **relayed})
        with self.reporter.stage("first weights proved"):
            await self.policy.connect(self.folder.latest_checkpoint() if self._resume else None)
            self.policy.watch()
            self.cluster.start_runners(self.agent, self._runners, self._hooks)
            self._queue_watch = asyncio.create_task(watch_queue(self.folder.path.name, self.store, self._lives))
        if not self._resume:
            await self._evaluate_all("before")
        self.reporter.start_steps(self.state.step, settings.steps)
        self.reporter.restart_clock()
        if self.state.seconds_to_first_step is None:
            self.state.seconds_to_first_step = self.elapsed()

    async def _start_store(self, settings: WeightAlgorithm) -> None:
        self.cluster.start_ray()
        self.store = self.cluster.start_store(self.folder.store, settings.store_shards)
        await self.store.statistics()
        write_json(self.folder.path / "ray.json", self.cluster.whereabouts())
        assert self.cluster.failure is not None
        limits = settings.rollout_timeout_seconds, settings.max_attempts
        self._rollouts = RunRollouts(self.store, self.cluster.failure, *limits)
        await self._rollouts.cancel_leftovers()

    async def _model(self, settings: WeightAlgorithm) -> Path:
        """The initial model; after a resume too, as old checkpoints go and a restarting replica loads it again."""
        if not callable(settings.model):
            return Path(settings.model)
        folder = self.folder.path / "model"
        if not self._resume:
            with self.reporter.stage("warm start") as stage, as_current(stage):
                await in_thread(settings.model, folder)
        return folder

    async def restart_trainers(self, reason: str) -> None:
        """Start the trainer ranks anew from the last checkpoint, or from the initial model, and publish its weights
        under the next version; engine and runners go on. The run's state goes back to that checkpoint.
        """
        before = self.state
        self.reporter.note(f"the trainer ranks are started anew: {reason}")
        self.cluster.trainers.stop()
        latest = self.folder.latest_checkpoint()
        if latest is not None:
            self.state = RunState.of(self.folder.read_state())
        else:
            self.state = RunState(evaluations=before.evaluations, seconds_to_first_step=before.seconds_to_first_step)
        self.state.trainer_restarts = before.trainer_restarts + 1
        self.folder.truncate_metrics(self.state.step)
        for name, policy in self.policies.items():
            await policy.restart(latest, self.state.policy(name))
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
        return await self._play(requests), group_of

    def request(
        self, task: Any, mode: RolloutMode, resources_id: str, metadata: dict[str, Any]
    ) -> EnqueueRolloutRequest:
        """What queues one rollout of a task, under the run's limits and an id of its own."""
        known = {**metadata, "weight_version": self.state.version}
        return self._rollouts.request(task, mode, resources_id, known)

    async def _play(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Episode]:
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
        """The episodes of rollouts that have ended, in the order of their ids."""
        ended = await self._rollouts.read(rollout_ids)
        self._agents |= ended.agents()
        return ended.episodes(self._settings.agent_match)

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

    def record_step(
        self, step: int, played: Sequence[Episode], account: Account, update: dict[str, Any], times: StepTimes
    ) -> None:
        """Account for a step and show it."""
        state = self.state
        refuse_total_failure(played)
        state.step = step + 1
        state.rollouts += len(played)
        state.step_seconds.append(times.whole)
        self.policy.count(played, account, update)
        swap = self.policy.swapper.last if update else None
        row = {
            **step_figures(step, played, account, update, swap, times, self._agents),
            "validation": self._validation,
            "weight_version": state.version,
            "trainer_restarts": state.trainer_restarts,
        }
        self._agents.clear()
        self.trackers.log(row)
        self.reporter.step(row, self._validation)

    # Validation

    async def validate(self) -> None:
        """Greedy pass over val_dataset."""
        if "val" in self.datasets:
            figures = await self._evaluate("val", "greedy")
            self._validation = figures.reward

    async def _evaluate_all(self, moment: str) -> None:
        for split in ("val", "test"):
            if split not in self.datasets:
                continue
            with self.reporter.stage(f"{split} {moment}, {len(self.datasets[split])} tasks"):
                for mode in ("sampled", "greedy"):
                    figures = await self._evaluate(split, mode)
                    self.state.evaluations[f"{split}.{mode}_{moment}"] = figures.as_dict()
                    if (split, mode) == ("val", "greedy"):
                        self._validation = figures.reward

    async def _evaluate(self, split: RolloutMode, mode: str) -> Evaluation:
        data = self.datasets[split]
        requests = [self.request(data[i], split, mode, {"evaluation": mode}) for i in range(len(data))]
        episodes = await self._play(requests)
        refuse_total_failure(episodes)
        figures = evaluate(episodes)
        self.trackers.log(
            {
                "kind": split,
                "mode": mode,
                "step": self.state.step,
                "reward": figures.reward,
                "turns": figures.turns,
                "failed": figures.failed,
                **{f"annotation.{key}": value for key, value in figures.annotations.items()},
            }
        )
        return figures

    # Keeping and ending

    async def checkpoint(self) -> None:
        """Save model, optimizer and run state, atomically."""
        writing = self.folder.begin_checkpoint(self.state.step)
        await self.policy.save(writing)
        self.state.seconds = self.elapsed()
        self.folder.commit_checkpoint(writing, self.state.step, asdict(self.state))

    async def finish(self) -> None:
        """Evaluate after the last step, write the summary, show the table."""
        self.reporter.end_steps()
        await self._evaluate_all("after")
        self.folder.plot()
        from lightning_ray.summary import summarize, summary_table

        summary = summarize(self.state, self.elapsed(), self.peak_memory, self.folder.metrics())
        write_json(self.folder.path / "summary.json", summary)
        columns, rows = summary_table(self.state)
        if rows:
            self.reporter.table("before and after", columns, rows)
        self.reporter.note(f"everything is in {self.folder.path}")

    async def close(self) -> None:
        """End what the run started."""
        self._done.set()
        self.reporter.end_steps()
        for policy in self.policies.values():
            policy.close()
        if self._queue_watch is not None:
            self._queue_watch.cancel()
        await in_thread(self.trackers.close)
        await self.cluster.stop()
        try:
            await in_thread(self.folder.plot_interrupted)
        except Exception as error:  # what ended the run matters more
            self.reporter.note(f"reward.png and training.png could not be drawn: {error}")

    def elapsed(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return self.state.seconds * self._resume + time.perf_counter() - self._began

    def _lives(self) -> list[int]:
        """How often each runner was started."""
        pool = self.cluster.runners
        return [] if pool is None else [runner["lives"] for runner in pool.status()]

    def _sample_memory(self) -> None:
        while not self._done.wait(4.0):
            self.peak_memory = max(self.peak_memory, tree_memory())
