"""The policy under training as Ray actors: one actor a rank, and the group that the driver holds.

The actor is a thin shell over ``PolicyUpdater``. The group calls all ranks alike, hands each the same batch
in the object store, and waits with a deadline: a rank that dies or stays silent ends in an
InfrastructureError that names the rank, the call and the cause. A group that has failed is stopped and
started anew, not mended.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.names import shown_name
from lightning_ray.deaths import Death, Process, death_of, here
from lightning_ray.deaths.process import Whereabouts
from lightning_ray.errors import InfrastructureError, LightningRayError, TrainersLostError, last_line
from lightning_ray.loading import uncollected
from lightning_ray.mirror.nodes import hand_over, present
from lightning_ray.net import RANK_RANGE, free_port
from lightning_ray.placement.asks import Ask
from lightning_ray.placement.places import Places
from lightning_ray.placement.room import let_go, placed
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.threads import ask_ray
from lightning_ray.waiting import waiting

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from lightning_ray.policy.publish import WeightPublisher
    from lightning_ray.policy.update import PolicyUpdater

ENDS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""What a call of a rank raises whose process is no more; Ray's memory monitor has an error of its own."""
SETTLE_SECONDS = 5.0
"""How long to wait for other ranks after the first has failed: a death explains what its peers report."""


class PolicyTrainer:
    """One rank; made an actor by the group. ``updater`` exists once ``start`` has returned."""

    updater: PolicyUpdater
    publisher: WeightPublisher

    def __init__(self, settings: UpdateSettings, rank: int, world_size: int) -> None:
        self.settings = settings
        self.rank = rank
        self.world_size = world_size

    def __repr__(self) -> str:
        return shown_name(self)

    def address(self) -> tuple[str, int]:
        """Where ranks can meet: this node's address and a port that is free now."""
        host = ray.util.get_node_ip_address()
        return host, free_port(host, RANK_RANGE)

    def whereabouts(self) -> Whereabouts:
        """This process, for who is to tell of its death."""
        return here()

    def start(self, master_address: str, master_port: int) -> None:
        """Import verl, join the other ranks and load the model: seconds to minutes."""
        for model in (self.settings.model_path, self.settings.reference.model):
            present(Path(model or self.settings.model_path))
        with uncollected():
            from lightning_ray.policy.update import PolicyUpdater

            self.updater = PolicyUpdater(self.settings, self.rank, self.world_size, master_address, master_port)

    def update(self, batch: pa.Table, version: int | None = None) -> dict[str, float]:
        return self.updater.update(batch, version)

    def logprobs(self, sequences: list[list[int]]) -> list[np.ndarray]:
        return self.updater.logprobs(sequences)

    def save(self, folder: str) -> None:
        self.updater.save(folder)

    def hand_over(self, folder: str, final: str, ranks: Sequence[int]) -> None:
        if self.rank in ranks:
            hand_over(Path(folder), Path(final))

    def load(self, folder: str) -> None:
        self.updater.load(str(present(Path(folder))))

    def load_transfer(self, transfer: str) -> None:
        """Import the weight transfer now (seconds), so that the first swap need not wait for it."""
        if self.rank == 0:
            from lightning_ray.policy.publish import load_transfer

            load_transfer(transfer)

    def attach_policy(self, policy: Any, transfer: str, timeout: float) -> None:
        """Name the deployment (a Serve handle) whose replicas get this group's weights."""
        from lightning_ray.policy.publish import WeightPublisher

        self.publisher = WeightPublisher(self.updater, self.rank, transfer)
        self._broadcast = lambda method, *args: policy.broadcast(method, *args).results(timeout_s=timeout)

    def connect_engine(self, offsets: dict[str, int], world_size: int) -> None:
        """Form the transfer group with the engine workers; see ``WeightPublisher.connect``."""
        self.publisher.connect(self._broadcast, offsets, world_size, ray.util.get_node_ip_address())

    def export(self, chunk: int, chunks: int, size: int) -> dict[str, Any] | None:
        """A chunk of the weights in the object store, from rank 0; see ``WeightPublisher.export``."""
        return self.publisher.export(chunk, chunks, size)

    def push(self, version: int, canaries: list[list[int]] | None = None) -> dict[str, int]:
        """Send the weights to every replica as ``version``; returns their bits, see ``WeightPublisher.push``."""
        return self.publisher.push(version, canaries)

    def probes(self) -> dict[str, list[float]]:
        """A few numbers for each parameter, comparable with the engine's."""
        from lightning_ray.policy.probe import trainer_probes

        return trainer_probes(self.updater.named_weights())

    def pid(self) -> int:
        return os.getpid()

    def ready(self) -> bool:
        """Whether the model is loaded."""
        return hasattr(self, "updater")

    def memory(self) -> int:
        """Resident bytes of this process."""
        return psutil.Process().memory_info().rss


class PolicyTrainerGroup:
    """All ranks of the policy under training. ``tell`` hears of a rank's death, which an error tells too."""

    def __init__(
        self, ranks: Sequence[Any] = (), tell: Callable[[Death], None] | None = None, place: Any = None
    ) -> None:
        self.ranks: list[Any] = []
        self._tell = tell
        self._place = place
        """The placement group of all ranks."""
        self._processes: list[Process] = []
        for rank in ranks:
            self.add(rank)

    def add(self, rank: Any) -> None:
        """The next rank's actor."""
        self._processes.append(Process("trainer rank", str(len(self.ranks))))
        self.ranks.append(rank)

    @classmethod
    async def start(
        cls,
        settings: UpdateSettings,
        ranks: int,
        timeout: float = 300.0,
        called: str | None = None,
        tell: Callable[[Death], None] | None = None,
        ask: Ask | None = None,
        wait_seconds: float | None = None,
    ) -> PolicyTrainerGroup:
        """Start ``ranks`` actors and load the model, within ``timeout`` seconds altogether. Their names in Ray are
        ``{called}-0`` and so on. They go, all together, where ``ask`` says, and wait for that
        place for ``wait_seconds`` of their own, if so told.

        Raises ConfigError for settings that cannot work, InfrastructureError if a rank does not come up;
        nothing is left running then.
        """
        # One thread a rank: ranks on one machine would otherwise fight for its cores.
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        began = time.monotonic()
        ask = ask or Places().ranks(ranks, settings.gpu_share if settings.device == "cuda" else 0)
        place = await placed(ask, timeout if wait_seconds is None else wait_seconds)
        deadline = (began if wait_seconds is None else time.monotonic()) + timeout
        group = cls(tell=tell, place=place)
        try:
            for rank, bundle in enumerate(ask.bundles):
                actor = ray.remote(PolicyTrainer).options(
                    name=None if called is None else f"{called}-{rank}",
                    num_cpus=bundle["CPU"],
                    num_gpus=bundle.get("GPU", 0),
                    runtime_env={"env_vars": env},
                    scheduling_strategy=PlacementGroupSchedulingStrategy(place, rank),
                )
                group.add(actor.remote(settings, rank, ranks))
            host, port = (await group.call("address", timeout=deadline - time.monotonic()))[0]
            places = await group.call("whereabouts", timeout=deadline - time.monotonic())
            group._processes = [Process.at("trainer rank", str(rank), where) for rank, where in enumerate(places)]
            await group.call("start", host, port, timeout=deadline - time.monotonic())
        except BaseException:
            group.stop()
            raise
        return group

    async def update(self, batch: pa.Table, version: int | None = None, timeout: float = 600.0) -> dict[str, float]:
        """Train the weights of ``version`` on a batch; see ``PolicyUpdater.update``."""
        return (await self.call("update", ray.put(batch), version, timeout=timeout))[0]

    async def logprobs(self, sequences: list[list[int]], timeout: float = 120.0) -> list[np.ndarray]:
        """Log probabilities under the present weights; see ``PolicyUpdater.logprobs``."""
        return (await self.call("logprobs", sequences, timeout=timeout))[0]

    async def save(self, folder: str, timeout: float = 600.0) -> None:
        """Write a checkpoint into a folder that all ranks see; see ``PolicyUpdater.save``."""
        await self.call("save", folder, timeout=timeout)

    async def hand_over(self, folder: str, final: str, timeout: float = 600.0) -> None:
        """Of a run at a URL: have what other nodes wrote into a folder sent to where ``final`` is mirrored."""
        here = ray.get_runtime_context().get_node_id()
        first = {process.node_id: rank for rank, process in reversed(list(enumerate(self._processes)))}
        elsewhere = sorted(rank for node, rank in first.items() if node != here)
        if elsewhere:
            await self.call("hand_over", folder, final, elsewhere, timeout=timeout)

    async def load(self, folder: str, timeout: float = 600.0) -> None:
        """Go on from a checkpoint; see ``PolicyUpdater.load``."""
        await self.call("load", folder, timeout=timeout)

    async def call(self, method: str, *args: Any, timeout: float) -> list[Any]:
        """Call a method of every rank and return their results, by rank.

        A LightningRayError or ValueError of a rank is raised as it is. Raises InfrastructureError if a rank
        died, failed otherwise, or did not answer within ``timeout`` seconds.
        """
        return await self.answers(self.begin(method, *args), method, timeout)

    def begin(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank without waiting; references to their answers, by rank. Raises TrainersLostError
        if there are none.
        """
        if not self.ranks:
            raise TrainersLostError(
                f"there are no trainer ranks to call {method!r}: they were ended, or are being started"
            )
        return [getattr(actor, method).remote(*args) for actor in self.ranks]

    async def answers(self, references: Sequence[Any], method: str, timeout: float) -> list[Any]:
        """The results of a call that was begun; see ``call``."""
        pending = {asyncio.ensure_future(_result(reference)): rank for rank, reference in enumerate(references)}
        for task in pending:
            task.add_done_callback(_ignore)
        with waiting(f"trainer rank(s) at {method!r}", lambda: _at_work(pending)):
            done, silent = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() for task in done):
            if silent:
                done |= (await asyncio.wait(silent, timeout=SETTLE_SECONDS))[0]
            raise await self._worst({pending[task]: task.exception() for task in done}, method)
        if silent:
            ranks = sorted(pending[task] for task in silent)
            raise TrainersLostError(
                f"trainer rank {ranks} did not answer {method!r} within {timeout:g} s: alive, but at work or stuck. "
                "If the work is large, give a longer timeout; else resume from the last checkpoint",
                silent=True,
            )
        return [task.result() for task in pending]

    async def _worst(self, failures: dict[int, BaseException | None], method: str) -> Exception:
        """What to raise for the failures of ranks: a death first, then what a rank says of itself."""
        errors = {rank: error for rank, error in sorted(failures.items()) if error is not None}
        for rank, error in errors.items():
            if isinstance(error, ENDS):
                return TrainersLostError(str(await self._death(rank, error, method)))
        for error in errors.values():
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, LightningRayError | ValueError):
                return cause
        rank, error = next(iter(errors.items()))
        failure = InfrastructureError(f"trainer rank {rank} failed in {method!r}: {last_line(error)}")
        failure.__cause__ = error
        return failure

    async def _death(self, rank: int, error: BaseException, method: str) -> Death:
        death = await ask_ray(death_of, self._processes[rank], error, None, method)
        if self._tell is not None:
            self._tell(death)
        return death

    def stop(self) -> None:
        """End all ranks at once; what they have not saved is lost."""
        for actor in self.ranks:
            ray.kill(actor)
        self.ranks = []
        if self._place is not None:
            let_go(self._place)
            self._place = None


async def _result(reference: Any) -> Any:
    return await reference


def _at_work(pending: Mapping[asyncio.Task[Any], int]) -> str:
    """The ranks that have not answered."""
    ranks = sorted(rank for task, rank in pending.items() if not task.done())
    return f"ranks {', '.join(map(str, ranks))} of {len(pending)}"


def _ignore(task: asyncio.Future[Any]) -> None:
    """Take note of a failure that nobody waits for any more, which asyncio would else complain about."""
    if not task.cancelled():
        task.exception()
