"""What an algorithm of one's own trains weights with: play, train, publish. Thin over a run.

    play    tasks --runners--> groups of episodes
    train   episodes with advantages --trainer ranks--> new weights
    publish new weights --swap, proved--> replicas; the step is over, and told

Every rollout is settled once, at the latest by the ``publish`` after which it would be older than ``max_staleness``
allows: trained on, or dropped for a reason.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_ray.algorithms.source import Played
from lightning_ray.errors import ConfigError
from lightning_ray.run.phases import PhaseClock
from lightning_ray.run.state import ONLY
from lightning_ray.run.step_figures import StepTimes
from lightning_ray.store.base import Store
from lightning_ray.trajectories.account import Account, batch_of
from lightning_ray.trajectories.episode import Episode
from lightning_ray.trajectories.given import settle_given, with_advantages
from lightning_ray.trajectories.run_steps import group_of

if TYPE_CHECKING:
    from lightning_ray.algorithms.own import TrainingAlgorithm
    from lightning_ray.evaluation.figures import Evaluation
    from lightning_ray.run.run import Run

SUMS = ("trained_tokens", "trained_rollouts", "lone_rollouts", "seconds")
"""Figures that add up over the updates of a step; of the others the last counts."""


class TrainingSession:
    """See the module; given to algorithms that have a model. One step at a time."""

    def __init__(self, settings: TrainingAlgorithm, run: Run):
        self.memory: dict[str, Any] = {}
        """What the algorithm wants to find again after a resume; plain values, kept with every checkpoint."""
        self._settings = settings
        self._run = run
        self._clock = PhaseClock()
        self._pending: dict[str, Episode] = {}
        """Played and not settled."""
        self._reset()

    def _reset(self) -> None:
        self._account = Account()
        self._advantages: dict[str, float] = {}
        self._by_rewards: bool | None = None
        """Whether the advantages of this step follow from rewards; None before its first ``train``."""
        self._update: dict[str, Any] = {}
        self._playing = 0.0

    def begin(self) -> None:
        """The run is up; after a resume, as its checkpoint left it."""
        self.memory = dict(self._run.state.flow.get("memory", {}))
        self._clock.lap()

    @property
    def step(self) -> int:
        """Steps that are over, those before a resume included."""
        return self._run.state.step

    @property
    def steps(self) -> int:
        """How many the settings ask for."""
        return self._settings.steps

    @property
    def version(self) -> int:
        """Of the weights that are served."""
        return self._run.policy.version

    @property
    def store(self) -> Store:
        """Every rollout and span."""
        return self._run.store

    async def play(self, tasks: Sequence[Any], n: int | None = None) -> list[list[Episode]]:
        """Play every task ``n`` times (``group_size``), sampled from the policy; a group of episodes for each task.

        An episode has ``reward`` (None if there was none), ``rollout``, ``trajectories`` and ``annotations``.
        """
        began = time.perf_counter()
        with self._clock.phase("rollouts"):
            ids = await self.enqueue(tasks, n)
            episodes = iter(await self.episodes([rollout_id for group in ids for rollout_id in group]))
        self._playing += time.perf_counter() - began
        return [[next(episodes) for _ in group] for group in ids]

    async def enqueue(self, tasks: Sequence[Any], n: int | None = None) -> list[list[str]]:
        """Queue every task ``n`` times and return at once: the rollouts' ids, a group for each task."""
        count = self._settings.group_size if n is None else n
        if not len(tasks) or count < 1:
            raise ConfigError(f"{len(tasks)} tasks, {count} times each: both must be at least 1")
        groups = []
        for task in tasks:
            metadata = {"group_id": f"gr-{uuid.uuid4().hex[:12]}"}
            groups.append([self._run.request(task, "train", "sampled", metadata) for _ in range(count)])
        await self.store.enqueue_many_rollouts([request for group in groups for request in group])
        return [[str(request.rollout_id) for request in group] for group in groups]

    async def episodes(self, rollout_ids: Sequence[str]) -> list[Episode]:
        """Wait until rollouts have ended; what came of them, in their order."""
        await self._run.wait_for(rollout_ids)
        found = await self._run.read(rollout_ids)
        self._pending |= {episode.rollout_id: episode for episode in found}
        return found

    async def train(self, episodes: Sequence[Episode], advantages: Sequence[float] | None = None) -> dict[str, Any]:
        """One update on these episodes; returns its figures, nothing if none of them could be trained on.

        ``advantages`` has one number for each episode; without it they follow from the rewards of each group, as the
        settings ``advantage`` and ``batch.groups`` have it. Episodes that failed are left out. Raises ConfigError for
        those that are settled, and for advantages that do not fit.
        """
        self._check(episodes, advantages)
        self._by_rewards = advantages is None
        groups = {episode.rollout_id: str(group_of(episode.rollout)) for episode in episodes}
        oldest, batch_settings = self.version - self._settings.max_staleness, self._settings.batch
        with self._clock.phase("update"):
            if advantages is None:
                account = self._settings.settle(episodes, groups, oldest)
                batch = batch_of(account.trained, groups)
            else:
                given = {each.rollout_id: float(a) for each, a in zip(episodes, advantages, strict=True)}
                account = settle_given(episodes, given, batch_settings, oldest)
                batch = with_advantages(batch_of(account.trained, groups), given)
                self._advantages |= given
            self._enter(account)
            if not account.trained:
                return {}
            self._run.check_tokens(account, self._settings.max_staleness)
            update = await self._run.update(batch)
        self._update = update | {name: self._update.get(name, 0.0) + update.get(name, 0.0) for name in SUMS}
        return update

    async def publish(self) -> int:
        """End the step: swap the new weights into every replica, prove them, and tell of the step; returns the version.

        Validates and saves as often as the settings say. Raises ConfigError if nothing was played.
        """
        run, settings, step = self._run, self._settings, self.step
        version = self.version + bool(self._update)
        played = self._settled(version)
        if not played.episodes:
            raise ConfigError("publish() ends a step, and no rollout was played in it: play first")
        line = played.record(step, {ONLY: self.version})
        if not self._by_rewards:
            line["advantages"] = {each.rollout_id: self._advantages[each.rollout_id] for each in played.account.trained}
        run.folder.append_step(line)
        if self._update:
            with self._clock.phase("swap"):
                await run.publish(version)
        phases = self._clock.lap()
        times = StepTimes(self._playing, sum(phases.values()), phases)
        run.record_step(step, played, {ONLY: self._update} if self._update else {}, times)
        await run.trace_step(step, played, times)
        self._reset()
        if settings.validate_every and self.step % settings.validate_every == 0 and self.step < settings.steps:
            await self.validate()
        if self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
            await self.save()
        return self.version

    async def validate(self) -> Evaluation | None:
        """A greedy pass over val_dataset: its figures, None without one."""
        with self._clock.phase("validate"):
            return await self._run.validate()

    async def save(self) -> None:
        """A checkpoint of the weights, the optimizer and ``memory``, from which ``--resume`` goes on."""
        with self._clock.phase("checkpoint"):
            self._run.state.flow = {"memory": self.memory}
            await self._run.checkpoint()

    def _check(self, episodes: Sequence[Episode], advantages: Sequence[float] | None) -> None:
        if advantages is not None and len(advantages) != len(episodes):
            raise ConfigError(
                f"train() got {len(episodes)} episodes and {len(advantages)} advantages: give one for each"
            )
        if self._by_rewards not in (None, advantages is None):
            raise ConfigError("train() was called with advantages and without in one step: publish() between the two")
        settled = [each.rollout_id for each in episodes if each.rollout_id not in self._pending]
        if settled:
            raise ConfigError(
                f"train() got rollout {settled[0]} ({len(settled)} in all), which an earlier step settled; raise "
                f"max_staleness (now {self._settings.max_staleness}) to train on it for longer"
            )

    def _enter(self, account: Account) -> None:
        """What was trained in this step counts as that, and once, whatever else becomes of it."""
        known = {episode.rollout_id for episode in self._account.trained}
        self._account.add(replace(account, trained=[e for e in account.trained if e.rollout_id not in known]))
        for episode in self._account.trained:
            self._account.dropped.pop(episode.rollout_id, None)

    def _settled(self, version: int) -> Played:
        """What this step settles: what was given to ``train``, and what would be too old from ``version`` on."""
        known = {episode.rollout_id for episode in self._account.trained} | self._account.dropped.keys()
        oldest, last = version - self._settings.max_staleness, self.step + 1 >= self.steps
        over = [e for e in self._pending.values() if e.rollout_id in known or last or self._is_over(e, oldest)]
        rest = [episode for episode in over if episode.rollout_id not in known]
        self._account.add(settle_given(rest, {}, self._settings.batch))
        groups = {episode.rollout_id: str(group_of(episode.rollout)) for episode in over}
        for episode in over:
            del self._pending[episode.rollout_id]
        return Played(over, groups, list(dict.fromkeys(groups.values())), self._account)

    def _is_over(self, episode: Episode, oldest: int) -> bool:
        queued = (episode.rollout.metadata or {}).get("weight_version", 0)
        return not self._settings.max_staleness or queued < oldest
