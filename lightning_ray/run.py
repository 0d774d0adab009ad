"""One training run: what an algorithm works with.

Offers data, rollouts, updates, swaps, validation, checkpoints and reports; which of them, when, is the algorithm's
business. Every rollout of every step ends in an account; every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_ray.agent import LitAgent
from lightning_ray.algorithms.grpo import GRPO, NEUTRAL
from lightning_ray.cluster import Cluster, together, tree_memory
from lightning_ray.config import RunnerSettings
from lightning_ray.errors import AgentError, InfrastructureError, SwapError
from lightning_ray.evaluation import Evaluation, evaluate
from lightning_ray.hooks import Hook
from lightning_ray.policy.swap import PolicySwapper
from lightning_ray.progress import Reporter, as_current
from lightning_ray.run_folder import RunFolder, write_json
from lightning_ray.run_state import RunState
from lightning_ray.step_figures import StepTimes, agents_of, step_figures
from lightning_ray.store.base import Store
from lightning_ray.threads import in_thread
from lightning_ray.trackers import Choice, Trackers
from lightning_ray.trackers.ray_metrics import watch_queue
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode, last_attempts, read_episodes
from lightning_ray.types import (
    TERMINAL_ROLLOUT,
    Dataset,
    EnqueueRolloutRequest,
    RolloutConfig,
    RolloutMode,
)

WATCH_SECONDS = 5.0
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
        self.peak_memory = 0
        self._runners = runners
        self._hooks = hooks
        self._resume = resume
        self._began = time.perf_counter()
        self._settings: GRPO
        self._swapper: PolicySwapper
        self._model_folder: Path
        self._proved: list[int] = []
        """Weight versions that every replica proved."""
        self._watch: asyncio.Task[None] | None = None
        self._queue_watch: asyncio.Task[None] | None = None
        self._agents: dict[str, set[str]] = {}
        """By rollout read since the last step, the agents that took part."""
        self._validation: float | None = None
        self._done = threading.Event()

    # Starting

    async def start(self, settings: GRPO) -> None:
        """Bring up everything, publish the first weights, and evaluate before the first step."""
        self._settings = settings
        threading.Thread(target=self._sample_memory, daemon=True).start()
        with self.reporter.stage("Ray and span store"):
            self.cluster.start_ray()
            self.store = self.cluster.start_store(self.folder.store, settings.store_shards)
            await self.store.statistics()
            write_json(self.folder.path / "ray.json", self.cluster.whereabouts())
            await self._cancel_leftovers()
        model = self._model_folder = await self._model(settings)
        with self.reporter.stage("engine and trainer up"):
            endpoint, _ = await together(
                self.cluster.start_policy(model, settings.model_name, settings.engine),
                self.cluster.start_trainers(
                    settings.update_settings(model), settings.ranks, settings.engine.chosen_transfer
                ),
            )
            relayed = await self.cluster.start_relay()
        for name, sampling in RESOURCES.items():
            resource = endpoint.model_copy(update={"sampling_parameters": sampling})
            await self.store.update_resources(name, {"main_llm": resource, **relayed})
        with self.reporter.stage("first weights proved"):
            if self._resume:
                latest = self.folder.latest_checkpoint()
                await self.cluster.trainers.load(str(latest))
            self._swapper = await self.cluster.connect(settings.engine)
            await self.publish(self.state.version)
            self._watch = asyncio.create_task(self._watch_replicas())
            self.cluster.start_runners(self.agent, self._runners, self._hooks)
            self._queue_watch = asyncio.create_task(watch_queue(self.folder.path.name, self.store, self._lives))
        if not self._resume:
            await self._evaluate_all("before")
        self.reporter.start_steps(self.state.step, settings.steps)
        self.reporter.restart_clock()
        if self.state.seconds_to_first_step is None:
            self.state.seconds_to_first_step = self.elapsed()

    async def _model(self, settings: GRPO) -> Path:
        """The initial model; after a resume too, as old checkpoints go and a restarting replica loads it again."""
        if self._resume:
            self.state = RunState(**self.folder.read_state())
            self._proved = list(range(self.state.version))
            self.folder.truncate_metrics(self.state.step)
        if not callable(settings.model):
            return Path(settings.model)
        folder = self.folder.path / "model"
        if not self._resume:
            with self.reporter.stage("warm start") as stage, as_current(stage):
                await in_thread(settings.model, folder)
        return folder

    async def _cancel_leftovers(self) -> None:
        """Rollouts that an interrupted run left open are played again under new ids."""
        for rollout in await self.store.query_rollouts(status_in=["queuing", "preparing", "running", "requeuing"]):
            await self.store.update_rollout(rollout.rollout_id, status="cancelled")

    async def restart_trainers(self, reason: str) -> None:
        """Start the trainer ranks anew from the last checkpoint, or from the initial model, and publish its weights
        under the next version; engine and runners go on. The run's state goes back to that checkpoint.
        """
        settings, before = self._settings, self.state
        self.reporter.note(f"the trainer ranks are started anew: {reason}")
        self.cluster.trainers.stop()
        latest = self.folder.latest_checkpoint()
        if latest is not None:
            self.state = RunState(**self.folder.read_state())
        else:
            self.state = RunState(evaluations=before.evaluations, seconds_to_first_step=before.seconds_to_first_step)
        self.state.version, self.state.trainer_restarts = before.version, before.trainer_restarts + 1
        self.state.swaps, self.state.swaps_proved = before.swaps, before.swaps_proved
        self.folder.truncate_metrics(self.state.step)
        transfer = settings.engine.chosen_transfer
        await self.cluster.start_trainers(settings.update_settings(self._model_folder), settings.ranks, transfer)
        if latest is not None:
            await self.cluster.trainers.load(str(latest))
        self._swapper = await self.cluster.connect(settings.engine)
        await self.publish(self.state.version + 1)
        self.reporter.start_steps(self.state.step, settings.steps)

    async def _watch_replicas(self) -> None:
        """Give replicas that restarted or joined the current weights."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                if await self._swapper.unproved():
                    self.reporter.note("a replica without proved weights: publishing the current version to all")
                    await self.publish(self.state.version)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # told; the next step's own swap decides
                self.reporter.note(f"publishing to a fresh replica failed: {error}")

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
        settings = self._settings
        return EnqueueRolloutRequest(
            input=task,
            rollout_id=f"ro-{uuid.uuid4().hex[:16]}",
            mode=mode,
            resources_id=resources_id,
            config=RolloutConfig(
                timeout_seconds=settings.rollout_timeout_seconds,
                max_attempts=settings.max_attempts,
                retry_condition=["timeout", "unresponsive"],
            ),
            metadata={**metadata, "weight_version": self.state.version},
        )

    async def _play(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Episode]:
        queued = await self.store.enqueue_many_rollouts(requests)
        ids = [rollout.rollout_id for rollout in queued]
        await self.wait_for(ids)
        return await self.read(ids)

    async def wait_for(self, rollout_ids: Sequence[str]) -> None:
        """Return when all rollouts have ended. Raises InfrastructureError past the deadline that their own limits
        set, or when the runners fail.
        """
        settings = self._settings
        deadline = settings.rollout_timeout_seconds * settings.max_attempts + 120.0
        waiting = self.store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=deadline)
        ended = await self._unless_runners_fail(waiting, deadline + 60.0)
        if len(ended) < len(rollout_ids):
            rollouts = await self.store.query_rollouts(rollout_id_in=rollout_ids)
            states = dict(Counter(r.status for r in rollouts if r.status not in TERMINAL_ROLLOUT))
            raise InfrastructureError(
                f"{len(rollout_ids) - len(ended)} of {len(rollout_ids)} rollouts did not end within {deadline:.0f} s, "
                f"by state: {states}; the runners may be stuck: look at them in the Ray dashboard"
            )

    async def read(self, rollout_ids: Sequence[str]) -> list[Episode]:
        """The episodes of rollouts that have ended, in the order of their ids."""
        found = {r.rollout_id: r for r in (await self.store.query_rollouts(rollout_id_in=rollout_ids)).items}
        ended = [found[rollout_id] for rollout_id in rollout_ids]
        spans = await self.store.scan_spans(rollout_ids)
        counting = dict(pairs_of(spans))
        for rollout_id, times in Counter(rollout_id for rollout_id, _ in pairs_of(spans)).items():
            if times > 1:
                counting |= last_attempts((await self.store.query_attempts(rollout_id)).items)
        self._agents |= agents_of(spans, counting)
        return read_episodes(ended, spans, counting, self._settings.agent_match)

    async def _unless_runners_fail(self, waiting: Any, deadline: float) -> Any:
        task = asyncio.ensure_future(waiting)
        failure = self.cluster.failure
        assert failure is not None
        await asyncio.wait({task, failure}, return_when=asyncio.FIRST_COMPLETED, timeout=deadline)
        if failure.done():
            task.cancel()
            failure.result()
        if not task.done():
            task.cancel()
            raise InfrastructureError(f"the span store did not answer within {deadline:.0f} s")
        return task.result()

    # Learning

    async def update(self, batch: pa.Table) -> dict[str, Any]:
        """One policy update on the trainer ranks; returns its figures, with ``seconds``."""
        began = time.perf_counter()
        figures = await self.cluster.trainers.update(batch, self.state.version)
        return {**figures, "seconds": time.perf_counter() - began}

    def check_tokens(self, account: Account, max_staleness: int) -> None:
        """Count what must not be among the trained tokens: any of an unproved version, or older than the bound."""
        for episode in account.trained:
            for trajectory in episode.trajectories:
                versions = trajectory.weight_versions[trajectory.mask == 1]
                self.state.stale_tokens_beyond_bound += int((versions < self.state.version - max_staleness).sum())
                self.state.unproved_tokens_trained += int((~np.isin(versions, self._proved)).sum())

    async def publish(self, version: int) -> None:
        """Swap the weights on every replica, and prove it."""
        try:
            swap = await self._swapper.publish(version)
        except SwapError:
            self.state.swaps += 1
            raise
        self.state.swaps += 1
        for mended in swap.mended:
            self.reporter.note(mended)
        self.state.version = version
        self._proved.append(version)
        self.state.swaps_proved += 1
        self.state.max_logprob_diff = max(self.state.max_logprob_diff, swap.max_logprob_diff)
        self.state.swap_ms.append(swap.seconds * 1e3)

    def record_step(
        self, step: int, played: Sequence[Episode], account: Account, update: dict[str, Any], times: StepTimes
    ) -> None:
        """Account for a step and show it."""
        state = self.state
        self._refuse_total_failure(played)
        state.step = step + 1
        state.rollouts += len(played)
        state.rollouts_trained += len(account.trained)
        state.rollouts_dropped = dict(Counter(state.rollouts_dropped) + Counter(account.drops_by_reason()))
        state.tokens_sampled += sum(episode.sampled_tokens for episode in played)
        state.tokens_trained += int(update.get("trained_tokens", 0))
        state.step_seconds.append(times.whole)
        state.max_logprob_diff = max(state.max_logprob_diff, update.get("max_logprob_diff", 0.0))
        swap = self._swapper.last if update else None
        row = {
            **step_figures(step, played, account, update, swap, times, self._agents),
            "validation": self._validation,
            "weight_version": state.version,
            "trainer_restarts": state.trainer_restarts,
        }
        self._agents.clear()
        self.trackers.log(row)
        self.reporter.step(row, self._validation)

    def _refuse_total_failure(self, played: Sequence[Episode]) -> None:
        """When every rollout failed there is nothing to learn: say why and stop."""
        failures = [(e.rollout.metadata or {}).get("failure") or {} for e in played if e.rollout.status == "failed"]
        if len(failures) < len(played):
            return
        [((kind, reason), count)] = Counter((f.get("kind"), f.get("reason")) for f in failures).most_common(1)
        if kind == "infrastructure":
            raise InfrastructureError(
                f"all {len(played)} rollouts failed, and not by the agent; most often ({count}x): {reason}. "
                "See the logs of runners and policy replicas in the Ray dashboard, then resume"
            )
        raise AgentError(
            f"the agent failed in all {len(played)} rollouts; most often ({count}x): {reason}. "
            "The exceptions with their tracebacks are in the run's span store"
        )

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
        self._refuse_total_failure(episodes)
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
        await self.cluster.trainers.save(str(writing))
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
        for watch in (self._watch, self._queue_watch):
            if watch is not None:
                watch.cancel()
        await in_thread(self.trackers.close)
        await self.cluster.stop()

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


def pairs_of(spans: pa.Table) -> set[tuple[str, str]]:
    """The (rollout, attempt) ids that left spans."""
    return set(zip(spans["rollout_id"].to_pylist(), spans["attempt_id"].to_pylist(), strict=True))
