"""How a run that chaos befalls is watched from outside: its store, replicas, front door and files; and the clocks."""

from __future__ import annotations

import asyncio
import csv
import json
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.chaos_agent import read_notes
from benchmarks.chaos_cluster import Driver, Nodes
from lightning_ray.run.folder import RunFolder
from lightning_ray.store.client import StoreClient
from lightning_ray.store.schema import spans_to_batch
from lightning_ray.threads import in_thread
from lightning_ray.types import AttemptedRollout

LOOK_SECONDS = 0.1
HANG_SECONDS = 120.0
CALL_SECONDS = 20.0


class Probe:
    """A client of the store that appends a span ten times a second, and knows which were acknowledged."""

    def __init__(self) -> None:
        self.acknowledged: list[tuple[str, str]] = []
        """Rollout and span ids."""
        self.last_begun = 0.0
        """When the last acknowledged append was begun, in Unix seconds."""
        self._task: asyncio.Task[None] | None = None

    def attach(self, store: StoreClient) -> None:
        """From now on, to this store."""
        self.detach()
        self._task = asyncio.create_task(self._append(store))

    def detach(self) -> None:
        """Append no more."""
        if self._task is not None:
            self._task.cancel()

    async def _append(self, store: StoreClient) -> None:
        rollout = await store.start_rollout({"probe": True}, mode="test")
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id, "trace_id": "0" * 32}
        while True:
            began, span_id = time.time(), uuid.uuid4().hex[:16]
            row = {**ids, "sequence_id": 0, "span_id": span_id, "name": "probe", "status": "OK", "start_time": began}
            await store.append_spans(spans_to_batch([row]))
            self.acknowledged.append((rollout.rollout_id, span_id))
            self.last_begun = began
            await asyncio.sleep(LOOK_SECONDS)


class Scene:
    """A run on a cluster, as others see it."""

    def __init__(self, nodes: Nodes, folder: RunFolder, notes: Path):
        self.nodes = nodes
        self.folder = folder
        self.notes = notes
        self.probe = Probe()
        self.driver: Driver
        self.store: StoreClient
        self.application = ""
        self.finished: dict[str, str] = {}
        """Rollout -> attempt, of those that the store told to have succeeded, as of the last look."""
        self.longest_pause = 0.0
        """Seconds without any progress."""
        self._progress = time.monotonic()
        self._policy: Any = None
        self._seen: tuple[Any, ...] = ()
        self._watching: asyncio.Task[None] | None = None

    async def attach(self, driver: Driver) -> None:
        """Watch the run of a driver that has just been started; returns when its store can be reached."""
        self.driver = driver
        self.probe.detach()
        about = self.folder.path / "ray.json"

        async def is_up() -> bool:
            if not about.exists() or about.stat().st_mtime < driver.began:
                return False
            where = json.loads(about.read_text())
            actor = ray.get_actor(where["store"], namespace=where["namespace"])
            self.store = StoreClient(actor, deadline=HANG_SECONDS)
            await self.store.statistics()
            return True

        await self.until(is_up, "the span store is up")
        self.application = json.loads(about.read_text())["namespace"]
        self.probe.attach(self.store)
        self._policy = None
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Watch no more."""
        self.probe.detach()
        if self._watching is not None:
            self._watching.cancel()

    # What there is to see

    async def playing(self) -> dict[str, list[str]]:
        """Worker -> the rollouts that it plays."""
        rollouts = await self.store.query_rollouts(status_in=["preparing", "running"])
        played: dict[str, list[str]] = {}
        for rollout in rollouts:
            if isinstance(rollout, AttemptedRollout) and rollout.attempt.worker_id:
                played.setdefault(rollout.attempt.worker_id, []).append(rollout.rollout_id)
        return played

    async def replicas(self) -> list[dict[str, Any]]:
        """What each replica says of itself. Raises if one that is dead is not yet known to be."""
        if self._policy is None:
            self._policy = serve.get_deployment_handle("policy", self.application)
        return await in_thread(lambda: self._policy.broadcast("describe").results(timeout_s=CALL_SECONDS))

    async def given(self) -> Counter[str]:
        """How many calls HAProxy has given to each replica that it knows."""
        [admin] = (self.nodes.temp / "haproxy").glob("*/admin.sock")
        reader, writer = await asyncio.open_unix_connection(admin)
        writer.write(b"show stat\n")
        rows = csv.DictReader((await reader.read()).decode().removeprefix("# ").splitlines())
        writer.close()
        names = ("FRONTEND", "BACKEND")
        return Counter({row["svname"]: int(row["stot"]) for row in rows if row["svname"] not in names})

    def steps(self) -> list[dict[str, Any]]:
        """The rows of the steps made so far."""
        return [row for row in self.folder.metrics() if row["kind"] == "train"]

    def trainer_restarts(self) -> int:
        """How often the trainer ranks had been started anew by the last step."""
        return max((row["trainer_restarts"] for row in self.steps()), default=0)

    def fresh_notes(self, since: float) -> list[dict[str, Any]]:
        """What agents noted down in files that were written since then."""
        return read_notes(self.notes, since)

    async def look_at_finished(self) -> None:
        """Note which rollouts have ended well: from here on none of them may be lost."""
        for rollout in await self.store.query_rollouts(status_in=["succeeded"]):
            if isinstance(rollout, AttemptedRollout):
                self.finished[rollout.rollout_id] = rollout.attempt.attempt_id

    # Waiting

    async def until(self, is_so: Callable[[], Awaitable[bool]], what: str, seconds: float = 2 * HANG_SECONDS) -> float:
        """Wait until something is so; when it was. What is asked may fail meanwhile. Raises TimeoutError."""
        deadline, last = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            self.driver.check()
            try:
                if await is_so():
                    return time.time()
                last = ""
            except Exception as error:  # a part that is dead, and not yet known to be
                last = f"{type(error).__name__}: {error}"[:500]
            await asyncio.sleep(LOOK_SECONDS)
        raise TimeoutError(f"not within {seconds:.0f} s: {what}; {last}")

    async def until_step(self, step: int) -> float:
        """Wait until so many steps were made."""

        async def is_made() -> bool:
            return len(self.steps()) >= step

        return await self.until(is_made, f"step {step} is made")

    async def _watch(self) -> None:
        """Keep the longest time without a noted answer, a step or a checkpoint."""
        while True:
            notes = sum(file.stat().st_size for file in self.notes.glob("*.jsonl"))
            metrics, latest = (self.folder.path / name for name in ("metrics.jsonl", "checkpoints/latest"))
            seen = (notes, *(file.stat().st_mtime if file.exists() else 0 for file in (metrics, latest)))
            if seen != self._seen:
                self._seen, self._progress = seen, time.monotonic()
            self.longest_pause = max(self.longest_pause, time.monotonic() - self._progress)
            await asyncio.sleep(1.0)
