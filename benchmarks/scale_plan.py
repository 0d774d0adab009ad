"""What a deployment needs of each part, reckoned from what was measured on two cores; nothing is run.

    python -m benchmarks.scale --plan gpus=1000 rollouts=100000 seconds=300 calls=10 ...

Everything is linear in what it counts. A rollout's CPU in store, driver and runners is that of the benchmark's
rollout, through Ray, times the model calls over the benchmark's: all of it is reckoned as if calls made it, which is
too much rather than too little. How far this goes beyond what was measured is said in docs/scale.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.scale_agent import TURNS
from lightning_ray.errors import ConfigError

COSTS = Path(__file__).with_name("scale.json")
BUSY = 0.6
"""Of a core that a process of one thread is to be busy at most, so that waiting stays short."""
NODE_CORES = 64
REPLICA_MS_A_CALL = 3.13
"""CPU of a replica's front end, vLLM's app (2.4) and capture (0.73); benchmarks/RESULTS.md, Capture."""
DISK_SHARE = 0.48
"""Of a span's bytes as Arrow, once compacted; benchmarks/RESULTS.md, The span store."""
ID_BYTES, SAMPLED_BYTES, TEXT_BYTES, SPAN_BYTES = 4, 12, 4.5, 1000
"""A prompt's token id; a sampled id with logprob and weight version; a token's text, in bytes; the rest of a span."""
RAY_NODES, RAY_ACTORS, RAY_GROUPS = 3000, 20_000, 1000
"""Ray's own scalability envelope: nodes, actors and placement groups that its release tests run."""


@dataclass(frozen=True)
class Deployment:
    """What is to be run."""

    gpus: int = 1000
    rollouts: int = 100_000
    """At once."""
    seconds: float = 300.0
    """Of a rollout, on average."""
    calls: int = 10
    """Model calls of a rollout."""
    prompt_tokens: int = 4000
    """Of a call, on average."""
    sampled_tokens: int = 400
    trainer_share: float = 0.25
    """Of the GPUs."""
    gpus_per_replica: int = 2
    gpus_per_node: int = 8
    parameters_b: float = 8.0
    """Billions, sent in bfloat16."""
    step_seconds: float = 60.0
    """From one swap to the next."""
    concurrency: int = 2500
    """Rollouts of a runner process."""


class Costs(NamedTuple):
    """What a rollout of the benchmark was measured to take: CPU ms of each part, and kB while it is played."""

    store_ms: float
    """With the model calls of thousands of rollouts sharing appends, as two processes send them."""
    store_alone_ms: float
    """With each model call an append and a message of its own, as hundreds of replicas send them."""
    compaction_ms: float
    driver_ms: float
    runner_ms: float
    raylet_ms: float
    store_kb: float
    driver_kb: float
    runner_kb: float


class Need(NamedTuple):
    """One row of the plan."""

    part: str
    what: str
    value: float
    unit: str


def costs_of(figures: Mapping[str, Any]) -> Costs:
    """From the JSON of a full run: the store's CPU at 10,000 through Ray, the others' most at 10,000 with any number of
    shards and nodes; memory from the difference between 10,000 and 1,000.

    At 1,000 nearly every message carries one thing: what it costs there, and what Ray adds, is ``store_alone_ms``.
    """
    points = figures["points"]
    alone = [point for point in points if point["shards"] == point["nodes"] == 1]
    try:
        remote = next(point for point in alone if not point["line"])
        few, *_, many = sorted((p for p in alone if p["line"] and p["concurrency"] <= 10_000), key=_concurrency)
    except (StopIteration, ValueError):
        raise ConfigError(
            "the costs have too few points; give costs=FILE with the JSON of a full run of benchmarks.scale"
        ) from None
    more, store = many["concurrency"] - few["concurrency"], "store_cpu_ms_per_rollout"
    return Costs(
        remote[store],
        few[store] + max(0.0, remote[store] - many[store]),
        *(
            max(point[f"{part}_cpu_ms_per_rollout"] for point in points if _concurrency(point) == _concurrency(many))
            for part in ("compaction", "driver", "runners", "raylets")
        ),
        *((many[f"{part}_pss_mb"] - few[f"{part}_pss_mb"]) / more * 1e3 for part in ("store", "driver", "runners")),
    )


def needs(what: Deployment, costs: Costs) -> list[Need]:
    """The plan, part by part."""
    per_s = what.rollouts / what.seconds
    calls = per_s * what.calls
    heavier = (what.calls + 1) / (TURNS + 1)
    span_bytes = (
        what.prompt_tokens * (ID_BYTES + TEXT_BYTES) + what.sampled_tokens * (SAMPLED_BYTES + TEXT_BYTES) + SPAN_BYTES
    )
    in_bytes = calls * span_bytes

    def cores(milliseconds: float) -> float:
        return per_s * milliseconds * heavier / 1e3

    shards = math.ceil(cores(costs.store_alone_ms) / BUSY)
    runners = math.ceil(what.rollouts / what.concurrency)
    replicas = int(what.gpus * (1 - what.trainer_share)) // what.gpus_per_replica
    ranks = what.gpus - replicas * what.gpus_per_replica
    nodes = math.ceil(what.gpus / what.gpus_per_node)
    runner_cores = cores(costs.runner_ms)
    weights = what.parameters_b * 2
    return [
        Need("load", "rollouts ended", per_s, "/s"),
        Need("load", "model calls", calls, "/s"),
        Need("load", "a span as Arrow", span_bytes / 1e3, "kB"),
        Need("store", "CPU, calls sharing appends", cores(costs.store_ms), "cores"),
        Need("store", "CPU, each call by itself", cores(costs.store_alone_ms), "cores"),
        Need("store", f"shards, each busy {BUSY:.0%} of a core at most", shards, ""),
        Need("store", "CPU of compaction", cores(costs.compaction_ms), "cores"),
        Need("store", "memory for what is played", what.rollouts * costs.store_kb / 1e6, "GB"),
        Need("store", "network in, and the same out to the driver", in_bytes / 1e6, "MB/s"),
        Need("store", "disk, compacted", in_bytes * DISK_SHARE * 3600 / 1e9, "GB/h"),
        Need("driver", "CPU, of one core", cores(costs.driver_ms), "cores"),
        Need("driver", "rollouts at most, at that cost", 1e3 * BUSY / (costs.driver_ms * heavier), "/s"),
        Need("driver", "memory for what is waited for", what.rollouts * costs.driver_kb / 1e6, "GB"),
        Need("driver", "spans of a step, to be held at once", in_bytes * what.step_seconds / 1e9, "GB"),
        Need("runners", "processes", runners, ""),
        Need("runners", "CPU of the library, without the agents", runner_cores, "cores"),
        Need("runners", "memory of the library", what.rollouts * costs.runner_kb / 1e6, "GB"),
        Need(
            "runners",
            "rollouts that one core carries at most",
            what.seconds / (costs.runner_ms * heavier) * 1e3 * BUSY,
            "",
        ),
        Need("serve", "replicas", replicas, ""),
        Need("serve", "calls a replica", calls / replicas, "/s"),
        Need("serve", "rollouts a replica", what.rollouts / replicas, ""),
        Need("serve", "CPU of each front end", calls / replicas * REPLICA_MS_A_CALL / 1e3, "cores"),
        Need("haproxy", "requests, all proxies", calls, "/s"),
        Need(
            "haproxy", "bodies, as text", calls * TEXT_BYTES * (what.prompt_tokens + what.sampled_tokens) / 1e6, "MB/s"
        ),
        Need("weights", "of one swap", weights, "GB"),
        Need("weights", "into all replicas", weights * replicas, "GB"),
        Need("weights", "into each node, for a tenth of a step", weights / (what.step_seconds / 10) * 8, "Gb/s"),
        Need("ray", "nodes with GPUs", nodes, ""),
        Need("ray", f"nodes of {NODE_CORES} cores for runners", math.ceil(runner_cores / BUSY / NODE_CORES), ""),
        Need("ray", f"actors (runners, shards, replicas, {ranks} ranks)", runners + shards + replicas + ranks, ""),
        Need("ray", "of the actors that Ray's own tests run", (runners + shards + replicas + ranks) / RAY_ACTORS, ""),
        Need("ray", "CPU of all raylets, for messages", cores(costs.raylet_ms), "cores"),
    ]


def main(given: Sequence[str]) -> None:
    """Print the plan for ``name=value`` pairs. Raises ConfigError for what is none."""
    pairs = dict(_pair(each) for each in given)
    figures = json.loads(Path(pairs.pop("costs", str(COSTS))).read_text())
    what, costs = deployment_of(pairs), costs_of(figures)
    table = Table(title=", ".join(f"{each.name} {getattr(what, each.name):,}" for each in fields(what)))
    for column in ("part", "needs", "", ""):
        table.add_column(column, justify="right" if column == "" else "left")
    plan, before = needs(what, costs), ""
    for need in plan:
        table.add_row("" if need.part == before else need.part, need.what, shown(need.value), need.unit)
        before = need.part
    Console(width=110).print(table)
    print(f"costs measured {figures['date']}, {figures['machine']}: {costs._asdict()}")


def deployment_of(pairs: Mapping[str, str]) -> Deployment:
    """Raises ConfigError for a name or a value that it has not."""
    kinds = {each.name: type(each.default) for each in fields(Deployment)}
    values = {}
    for name, text in pairs.items():
        if name not in kinds:
            raise ConfigError(f"--plan {name}={text}: there is no {name!r}; give {', '.join(kinds)} or costs=FILE")
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise ConfigError(f"--plan {name}={text}: give a number, such as {name}={kinds[name](1)}") from None
        if values[name] <= 0:
            raise ConfigError(f"--plan {name}={text}: give a number above 0")
    return Deployment(**values)


def shown(value: float) -> str:
    """With three digits that count."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--plan {text!r}: give NAME=VALUE, such as gpus=1000")
    return name, value


def _concurrency(point: Mapping[str, Any]) -> int:
    return int(point["concurrency"])
