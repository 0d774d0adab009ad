"""The figures of the store benchmark: each function measures some, with a fresh store behind its actor."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import ray
from rich.progress import Progress

from actors.span_store import start
from benchmarks.spans import SpanMaker
from benchmarks.store_client import ROLLOUT_SPANS, Client, Windows
from lightning_ray.store import StoreClient, open_folder, spans_to_batch

MILLION = 1_000_000
SMALL = 10_000
CLIENTS = 2
ROWS = 64
IN_FLIGHT = 4
WINDOWS = 3
CHUNK = 5_000
"""Spans a client loads in one go, between two movements of the progress bar."""
TURNS = 50
QUIET_SECONDS, PATIENCE_SECONDS = 3.0, 300.0
LEASE_SECONDS = 3600.0


class Scale(NamedTuple):
    """How much is measured."""

    spans: int
    window_seconds: float
    pool: int
    queries: int
    kills: int


FULL = Scale(spans=MILLION, window_seconds=8.0, pool=400, queries=300, kills=3)
QUICK = Scale(spans=100_000, window_seconds=3.0, pool=120, queries=300, kills=3)

Figures = dict[str, Any]


async def measure(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """All figures, one after the other, each with a fresh store."""
    figures: Figures = {}
    figures |= await ingest(folder, scale, progress)
    figures |= await single(folder, scale, progress)
    figures |= await cycles(folder, scale, progress)
    figures |= await multi_turn(folder, progress)
    return figures | await filled(folder, scale, progress)


class Tested:
    """A store of a folder of its own behind its actor, with the client of this process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.handle = start(self.folder, name, lease_seconds=LEASE_SECONDS)
        self.client = StoreClient(self.handle)

    async def process(self) -> psutil.Process:
        """The store's process."""
        return psutil.Process(await self.handle.process_id.remote())

    def clients(self, number: int) -> list[Any]:
        """Client processes."""
        return [ray.remote(Client).options(num_cpus=0).remote(self.handle, index) for index in range(number)]

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by folder within the store's."""
        result: dict[str, int] = {}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    part = path.relative_to(self.folder).parts[0]
                    result[part] = result.get(part, 0) + path.stat().st_size
        return result

    async def settled(self) -> None:
        """Compact what rests, and wait until nothing in the folder has changed for some seconds."""
        await self.client.compact()
        end, quiet, before = time.monotonic() + PATIENCE_SECONDS, time.monotonic(), self.sizes()
        while time.monotonic() < min(end, quiet + QUIET_SECONDS):
            await asyncio.sleep(0.2)
            now = self.sizes()
            if now != before:
                quiet, before = time.monotonic(), now

    def end(self, clients: Sequence[Any] = ()) -> None:
        """Kill the processes and remove the folder."""
        for actor in (*clients, self.handle):
            ray.kill(actor)
        shutil.rmtree(self.folder, ignore_errors=True)


async def ingest(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """Two clients append batches of 64 spans."""
    store = Tested(folder, "ingest")
    clients = store.clients(CLIENTS)
    rollouts = int(25_000 * scale.window_seconds * WINDOWS) // ROLLOUT_SPANS // CLIENTS
    with step(progress, "ingest: prepare"):
        built = await asyncio.gather(*(client.prepare.remote(scale.pool, ROWS, rollouts) for client in clients))
    process = await store.process()
    before, windows = process.cpu_times(), Windows(time.time() + 2.0, scale.window_seconds, WINDOWS)
    counts = [client.ingest.remote(windows, IN_FLIGHT) for client in clients]
    rates = await rates_of(counts, scale, progress, "ingest: batches of 64")
    after = process.cpu_times()
    await asyncio.gather(*(client.end.remote() for client in clients))
    spans = (await store.client.statistics())["total_spans"]
    store.end(clients)
    return {
        "ingest_spans_per_s_batch64": median(rates),
        "ingest_windows": rates,
        "ingest_store_cpu_us_per_span": round((sum(after[:2]) - sum(before[:2])) / spans * 1e6, 1),
        "build_us_per_span": round(median(built) * 1e6, 1),
    }


async def single(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """One client appends one span a call, 8 at a time."""
    store = Tested(folder, "single")
    clients = store.clients(1)
    with step(progress, "single: prepare"):
        await clients[0].prepare.remote(2000, 1, 1000)
    windows = Windows(time.time() + 1.0, scale.window_seconds, WINDOWS)
    rates = await rates_of([clients[0].ingest.remote(windows, 8)], scale, progress, "ingest: one span a call")
    store.end(clients)
    return {"ingest_spans_per_s_single": median(rates), "single_windows": rates}


async def cycles(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """Enqueue, lease, finish 16 rollouts at a time: 4 loops in one process, then in two."""
    figures: Figures = {}
    for number, key in ((1, "cycles_per_s"), (2, "cycles_per_s_2_processes")):
        store = Tested(folder, f"cycles-{number}")
        clients = store.clients(number)
        await asyncio.gather(*(client.end.remote() for client in clients))
        windows = Windows(time.time() + 1.0, scale.window_seconds, WINDOWS)
        counts = [client.cycles.remote(windows, 16, 4 // number) for client in clients]
        rates = await rates_of(counts, scale, progress, f"cycles: {number} client(s)")
        store.end(clients)
        figures |= {key: median(rates)}
    return figures


async def multi_turn(folder: Path, progress: Progress) -> Figures:
    """A conversation in which each turn's span has all turns before it, stored and compacted."""
    store = Tested(folder, "conversation")
    with step(progress, f"a conversation of {TURNS} turns"):
        rollout = await store.client.start_rollout("a conversation")
        key = rollout.rollout_id, rollout.attempt.attempt_id
        await store.client.compact()
        empty = sum(store.sizes().values())
        spans, unique = SpanMaker(7).conversation(key, TURNS)
        batches = [spans_to_batch([span]) for span in spans]
        for batch in batches:
            await store.client.append_spans(batch)
        await store.client.update_attempt(*key, status="succeeded")
        await store.client.compact()
        stored = sum(store.sizes().values()) - empty
        if (await store.client.scan_spans([key[0]]))["prompt_ids"].combine_chunks() != pa.concat_arrays(
            [batch["prompt_ids"] for batch in batches]
        ):
            raise RuntimeError("the conversation did not come back as it was stored")
    store.end()
    return {
        "multi_turn_storage_ratio": round(stored / unique, 3),
        "multi_turn_raw_ratio": round(sum(batch.nbytes for batch in batches) / unique, 1),
    }


async def filled(folder: Path, scale: Scale, progress: Progress) -> Figures:
    """What a store with many spans is like: sizes, query times, recovery."""
    store = Tested(folder, "filled")
    process = await store.process()
    await store.client.statistics()
    memory = resident_bytes(process)
    clients = store.clients(CLIENTS)
    task = progress.add_task("load", total=scale.spans)
    rollouts, raw = await load(store, clients, SMALL, progress, task)
    await store.settled()
    small = await query_times(store, rollouts, scale, progress)
    began = time.perf_counter()
    more, more_raw = await load(store, clients, scale.spans - SMALL, progress, task)
    seconds, rollouts, raw = time.perf_counter() - began, rollouts + more, raw + more_raw
    with step(progress, "compaction catches up"):
        await store.settled()
    figures: Figures = {
        "load_spans_per_s": round((scale.spans - SMALL) / seconds),
        "settled_s": round(time.perf_counter() - began - seconds - QUIET_SECONDS, 1),
        **{key: round((now - memory[key]) / scale.spans, 1) for key, now in resident_bytes(process).items()},
        "disk_bytes_per_span": round(sum(store.sizes().values()) / scale.spans, 1),
        "disk_bytes_by_part": store.sizes(),
        "raw_bytes_per_span": round(raw / scale.spans, 1),
    }
    figures["rss_over_raw"] = round(figures["rss_bytes_per_span"] / figures["raw_bytes_per_span"], 3)
    figures["disk_over_raw"] = round(figures["disk_bytes_per_span"] / figures["raw_bytes_per_span"], 3)
    large = await query_times(store, rollouts, scale, progress)
    for name, times in (("10k", small), ("1m" if scale.spans == MILLION else "100k", large)):
        figures[f"query_ms_p50_{name}"] = round(median(times), 2)
        figures[f"query_ms_p99_{name}"] = round(sorted(times)[int(0.99 * len(times))], 2)
    figures["query_p50_growth"] = round(median(large) / median(small), 2)
    figures |= await recovery(store, folder, scale, progress)
    store.end(clients)
    return figures


async def load(store: Tested, clients: list[Any], spans: int, progress: Progress, task: Any) -> tuple[list[str], int]:
    """Have the clients store that many spans; returns the rollouts' ids and the bytes as Arrow."""
    rollouts: list[str] = []
    raw, left = 0, spans

    async def fill(client: Any) -> None:
        nonlocal raw, left
        while left:
            left -= (chunk := min(CHUNK, left))
            ids, nbytes = await client.load.remote(chunk, ROWS, IN_FLIGHT)
            rollouts.extend(ids)
            raw += nbytes
            progress.advance(task, chunk)

    await asyncio.gather(*(fill(client) for client in clients))
    return rollouts, raw


async def query_times(store: Tested, rollouts: list[str], scale: Scale, progress: Progress) -> list[float]:
    """Milliseconds of one query after the other, of one random rollout each."""
    times = []
    chosen = random.Random(1)
    for _ in progress.track(range(scale.queries), description=f"query, {len(rollouts) * ROLLOUT_SPANS:,} spans"):
        rollout = chosen.choice(rollouts)
        began = time.perf_counter()
        spans = await store.client.scan_spans([rollout])
        times.append(1000 * (time.perf_counter() - began))
        if spans.num_rows != ROLLOUT_SPANS:
            raise RuntimeError(f"rollout {rollout} has {spans.num_rows} spans, not {ROLLOUT_SPANS}")
    return times


async def recovery(store: Tested, folder: Path, scale: Scale, progress: Progress) -> Figures:
    """From kill -9 to the next answer, with an empty store and with this one; and opening the folder alone.

    With less than a million spans the figure is what was measured, and opening the spans that are missing.
    """
    empty = Tested(folder, "empty")
    with step(progress, "kill -9 and recovery"):
        await empty.client.statistics()
        restart = median([await killed(empty) for _ in range(scale.kills)])
        times = [await killed(store) for _ in range(scale.kills)]
        began = time.perf_counter()
        view = open_folder(store.folder)
        opened = time.perf_counter() - began
        if (spans := view.statistics()["total_spans"]) != scale.spans:
            raise RuntimeError(f"of {scale.spans} spans {spans} came back")
    empty.end()
    missing = opened * (MILLION - scale.spans) / scale.spans
    return {
        "recovery_s_per_million_spans": round(median(times) + missing, 2),
        "recovery_s": round(median(times), 2),
        "recovery_ray_restart_s": round(restart, 2),
        "recovery_open_s_per_million_spans": round(opened * MILLION / scale.spans, 2),
    }


async def killed(store: Tested) -> float:
    """Seconds from kill -9 of the store's process to the next answer."""
    process = await store.process()
    began = time.perf_counter()
    process.kill()
    process.wait(10)
    await store.client.statistics()
    return time.perf_counter() - began


async def rates_of(counts: list[Any], scale: Scale, progress: Progress, name: str) -> list[int]:
    """The rates a second in each window, of all clients together; moves the bar meanwhile."""
    seconds = scale.window_seconds * WINDOWS
    task = progress.add_task(name, total=seconds)
    answer = asyncio.gather(*counts)
    while not answer.done():
        await asyncio.wait([answer], timeout=0.5)
        progress.advance(task, 0.5)
    progress.update(task, completed=seconds)
    return [round(sum(window) / scale.window_seconds) for window in zip(*await answer, strict=True)]


@contextlib.contextmanager
def step(progress: Progress, name: str) -> Iterator[None]:
    """A line of the bar for something of unknown length."""
    task = progress.add_task(name, total=None)
    yield
    progress.update(task, total=1, completed=1)


def resident_bytes(process: psutil.Process) -> dict[str, int]:
    """Resident memory of a process as the system counts it, and what of it is its own: without the pages of Ray's
    object store that it has looked at, which hold messages that have arrived and belong to that store.
    """
    told = (line.split() for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    bytes_ = {words[0]: int(words[1]) * 1024 for words in told if words[0].startswith(("VmRSS", "RssShmem"))}
    return {"rss_bytes_per_span": bytes_["VmRSS:"], "rss_own_bytes_per_span": bytes_["VmRSS:"] - bytes_["RssShmem:"]}
