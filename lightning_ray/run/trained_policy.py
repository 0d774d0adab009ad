"""One policy under training: its deployment and trainer ranks, the version of its weights, and what its swaps showed.

Its trainer ranks learn from a batch (``update``), and its replicas get and prove the weights (``publish``); replicas
that restarted or joined get them too (``watch``). Which batch, and when, is the algorithm's business.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_ray.algorithms.weights import WeightAlgorithm
from lightning_ray.cluster import Cluster
from lightning_ray.errors import SwapError, TrainersLostError
from lightning_ray.policy.swap import PolicySwapper
from lightning_ray.run.state import ONLY, PolicyState
from lightning_ray.together import together
from lightning_ray.trajectories.account import Account
from lightning_ray.trajectories.episode import Episode
from lightning_ray.types import ProxyLLM

WATCH_SECONDS = 5.0


class TrainedPolicy:
    """See the module. ``settings`` are the algorithm's for this policy; ``note`` shows a line to a person; ``lost`` is
    told when a fresh replica cannot be given weights, as a rank is dead: nobody else may call the ranks till then.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: WeightAlgorithm,
        state: PolicyState,
        note: Callable[[str], None],
        name: str = ONLY,
        lost: Callable[[TrainersLostError], None] = lambda error: None,
    ):
        self.name = name
        self.settings = settings
        self.state = state
        self.proved = list(range(state.version))
        """Weight versions that every replica proved."""
        self.model: Path
        """The initial model, which a restarting replica loads too."""
        self.swapper: PolicySwapper
        self.trainers: Any = None
        self._cluster = cluster
        self._note = note
        self._lost = lost
        self._watch: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """Of its weights."""
        return self.state.version

    # Starting and ending

    async def start(self, model: Path) -> ProxyLLM:
        """Bring up the deployment and the trainer ranks; returns the endpoint that agents use."""
        self.model = model
        settings = self.settings
        deploying = self._cluster.start_policy(model, settings.model_name, settings.engine, name=self.name)
        endpoint, _ = await together(deploying, self._start_trainers())
        return endpoint

    async def connect(self, checkpoint: Path | None) -> None:
        """Load a checkpoint, if there is one, and publish what the ranks have as the present version."""
        await self._connect(checkpoint)
        await self.publish(self.state.version)

    async def restart(self, checkpoint: Path | None, state: PolicyState) -> None:
        """Start the trainer ranks anew from the checkpoint, or from the initial model, and publish its weights under
        the next version. ``state`` is that of the checkpoint; versions and swaps count on.
        """
        before = self.state
        state.version, state.swaps, state.swaps_proved = before.version, before.swaps, before.swaps_proved
        self.state = state
        await self._start_trainers()
        await self._connect(checkpoint)
        await self.publish(self.state.version + 1)

    def watch(self) -> None:
        """From now on, give replicas that restarted or joined the current weights."""
        self._watch = asyncio.create_task(self._watch_replicas())

    def close(self) -> None:
        """Watch no more."""
        if self._watch is not None:
            self._watch.cancel()

    async def _start_trainers(self) -> None:
        settings = self.settings
        transfer = settings.engine.chosen_transfer
        update = settings.update_settings(self.model)
        self.trainers = await self._cluster.start_trainers(update, settings.ranks, transfer, self.name)

    async def _connect(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            await self.trainers.load(str(self.part(checkpoint)))
        self.swapper = await self._cluster.connect(self.settings.engine, self.name)

    async def _watch_replicas(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            trainers = self.trainers
            try:
                if await self.swapper.unproved():
                    self._note("a replica without proved weights: publishing the current version to all")
                    await self.publish(self.state.version)
            except asyncio.CancelledError:
                raise
            except TrainersLostError as error:
                if error.silent:
                    self._note(f"publishing to a fresh replica failed: {error}")
                elif trainers is self.trainers and trainers.ranks:  # otherwise they are being started anew
                    self._lost(error)
            except Exception as error:  # told; the next step's own swap decides
                self._note(f"publishing to a fresh replica failed: {error}")

    # Learning

    async def update(self, batch: pa.Table) -> dict[str, Any]:
        """One policy update on the trainer ranks; returns its figures, with ``seconds``."""
        began = time.perf_counter()
        if self.settings.engine.sleep:
            await self._cluster.applications.replicas_of(self.name)("sleep")
        figures = await self.trainers.update(batch, self.state.version)
        return {**figures, "seconds": time.perf_counter() - began}

    async def publish(self, version: int) -> None:
        """Swap the weights on every replica, and prove it."""
        try:
            swap = await self.swapper.publish(version)
        except SwapError:
            self.state.swaps += 1
            raise
        for mended in swap.mended:
            self._note(mended)
        state = self.state
        state.swaps += 1
        state.swaps_proved += 1
        state.version = version
        self.proved.append(version)
        state.max_logprob_diff = max(state.max_logprob_diff, swap.max_logprob_diff)
        state.swap_ms.append(swap.seconds * 1e3)

    async def save(self, checkpoint: Path) -> None:
        """Write weights and optimizer into the policy's part of a checkpoint."""
        await self.trainers.save(str(self.part(checkpoint)))

    async def hand_over(self, writing: Path, checkpoint: Path) -> None:
        """Of a run at a URL: have what ranks on other nodes wrote sent there, as this checkpoint's."""
        await self.trainers.hand_over(str(self.part(writing)), str(self.part(checkpoint)))

    def part(self, checkpoint: Path) -> Path:
        """Its folder of a checkpoint's: a folder in it, where there are several policies."""
        return checkpoint if self.name == ONLY else checkpoint / self.name

    # Settling and counting

    def settle(self, episodes: Sequence[Episode], group_of: dict[str, str]) -> Account:
        """Which rollouts are trained on now, with which rows and reward."""
        return self.settings.settle(episodes, group_of, self.version - self.settings.max_staleness)

    def check_tokens(self, account: Account, max_staleness: int | None = None) -> None:
        """Count what must not be among the trained tokens: any of an unproved version, or older than the bound."""
        if max_staleness is None:
            max_staleness = self.settings.max_staleness
        for episode in account.trained:
            for trajectory in episode.trajectories:
                versions = trajectory.weight_versions[trajectory.mask == 1]
                self.state.stale_tokens_beyond_bound += int((versions < self.state.version - max_staleness).sum())
                self.state.unproved_tokens_trained += int((~np.isin(versions, self.proved)).sum())

    def count(self, played: Sequence[Episode], account: Account, update: dict[str, Any]) -> None:
        """Enter what became of a step's rollouts."""
        state = self.state
        state.rollouts_trained += len(account.trained)
        state.rollouts_dropped = dict(Counter(state.rollouts_dropped) + Counter(account.drops_by_reason()))
        state.tokens_sampled += sum(episode.sampled_tokens for episode in played)
        state.tokens_trained += int(update.get("trained_tokens", 0))
        state.max_logprob_diff = max(state.max_logprob_diff, update.get("max_logprob_diff", 0.0))
