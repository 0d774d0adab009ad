"""What a run exports to Prometheus: by the catalogue, from rows, from looks at the run, and from replicas."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

import lightning_ray as lr
from lightning_ray.metrics import watch
from lightning_ray.metrics.catalogue import METRICS
from lightning_ray.metrics.exporter import Exporter
from lightning_ray.metrics.relay import export_status
from lightning_ray.metrics.replica import ReplicaMetrics
from lightning_ray.metrics.watch import Restarts, RunWatch, Watched
from lightning_ray.relay.app import RelayApp
from lightning_ray.trackers.ray_metrics import RayMetrics
from lightning_ray.types import RolloutStatus

STEP = {
    "kind": "train",
    "step": 4,
    "reward": 0.5,
    "rollouts": 8,
    "turns": 2.0,
    "wall_seconds": 10.0,
    "time.rollouts": 0.75,
    "time.update": 0.25,
    "rollouts_trained": 6,
    "dropped.no_variance": 2,
    "sampled_tokens": 0,
    "sampled_tokens_per_s": 90.0,
    "swap_ms": 250.0,
    "swap_ms.apply": 100.0,
    "weight_version": 5,
    "update.trained_tokens": 100.0,
    "update.staleness_mean": 0.5,
    "update.entropy": 1.5,
    "update.ratio_max": float("inf"),
    "validation": None,
}
Recorded = dict[tuple[str, ...], float]


class FakeMetric:
    """Keeps the last value of a gauge, the sum of a counter, how many values a histogram saw; by name and tags."""

    found: ClassVar[Recorded] = {}

    def __init__(self, name: str, description: str, *more: Any) -> None:
        self.name, self.tags = name, more[-1]

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert tuple(tags) == self.tags
        return (self.name.removeprefix("lightning_ray_"), *tags.values())

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.found[self._key(tags)] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.found[self._key(tags)] = self.found.get(self._key(tags), 0.0) + value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.inc(1.0, tags)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    import ray.util.metrics

    FakeMetric.found = {}
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(ray.util.metrics, kind, FakeMetric)
    return FakeMetric.found


def test_no_two_metrics_have_a_series_in_common() -> None:
    series = [name for metric in METRICS.values() for name in metric.series]
    assert len(series) == len(set(series)) and all(name.isidentifier() for name in series)
    assert METRICS["rollouts"].series == {"ray_lightning_ray_rollouts_total"}
    assert all(metric.tags[0] == "run" for metric in METRICS.values())


def test_what_is_no_number_is_not_exported(recorded: Recorded) -> None:
    export = Exporter(run="sql")
    for value in (None, float("nan"), True, "3"):
        export.set("step", value)
    export.add("rollouts", 0)
    assert recorded == {}
    export.set("step", 3)
    assert recorded == {("step", "sql"): 3.0}
    with pytest.raises(KeyError, match="policy"):
        export.set("swap_seconds", 1.0)


# Of steps


def test_ray_has_the_figures_of_steps_and_validations(recorded: Recorded) -> None:
    tracker = RayMetrics("sql")
    tracker.log(STEP)
    tracker.log({**STEP, "step": 5, "reward": None, "swap_ms": None})
    tracker.log({"kind": "val", "mode": "greedy", "step": 6, "reward": 0.75})
    tracker.log({"kind": "val", "mode": "sampled", "step": 6, "reward": 0.1})
    assert recorded == {
        ("step", "sql"): 6.0,
        ("step_seconds", "sql"): 10.0,
        ("phase_seconds", "sql", "rollouts"): 15.0,
        ("phase_seconds", "sql", "update"): 5.0,
        ("reward", "sql"): 0.5,
        ("validation_reward", "sql"): 0.75,
        ("turns", "sql"): 2.0,
        ("rollouts", "sql"): 16.0,
        ("rollouts_trained", "sql", "policy"): 12.0,
        ("rollouts_dropped", "sql", "policy", "no_variance"): 4.0,
        ("policy_reward", "sql", "policy"): 0.5,
        ("staleness", "sql", "policy"): 0.5,
        ("trained_tokens", "sql", "policy"): 200.0,
        ("sampled_tokens_per_second", "sql", "policy"): 90.0,
        ("update", "sql", "policy", "entropy"): 1.5,
        ("weight_version", "sql", "policy"): 5.0,
        ("swap_seconds", "sql", "policy"): 0.25,
        ("swap_part_seconds", "sql", "policy", "apply"): 0.1,
    }


def test_several_policies_are_told_apart(recorded: Recorded) -> None:
    own = {"rollouts_trained": 3, "weight_version": 2, "swap_ms": 40.0, "reward": 0.25}
    row = {"kind": "train", "step": 0, "reward": 0.5, "wall_seconds": 1.0, "swap_ms": 40.0, "sampled_tokens": 9}
    RayMetrics("two").log(
        row | {f"{name}.{key}": value for name in ("writer", "checker") for key, value in own.items()}
    )
    assert recorded["reward", "two"] == 0.5 and recorded["policy_reward", "two", "writer"] == 0.25
    assert recorded["rollouts_trained", "two", "checker"] == 3 and recorded["weight_version", "two", "writer"] == 2
    assert not any(key[0] == "sampled_tokens" for key in recorded), "the run's total is no policy's"


# Of looks at a run


class Run:
    """A run that changes between looks."""

    def __init__(self, folder: Path) -> None:
        self.known = {"queued": 7, "live_attempts": 3, "spans": 100, "disk_bytes": 5000, "rollouts_by_status": {}}
        self.steps, self.stores, self.replicas = 0, [11], ["a", "b"]
        self.watched = Watched(
            name="sql",
            folder=folder,
            store=self,
            step=lambda: self.steps,
            runners=lambda: 2,
            restarts=lambda: {"runner": 1, "trainer": 0},
            replicas=lambda: {"policy": self.replicas},
            bounds={"policy": 2},
            stores=self.processes,
        )

    async def statistics(self) -> dict[str, Any]:
        if not self.known:
            raise ConnectionError
        return self.known

    async def processes(self) -> list[int]:
        return self.stores


async def test_a_run_is_looked_at(recorded: Recorded, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.known["rollouts_by_status"] = {"succeeded": 4, "failed": 1}
    looking = RunWatch(run.watched)
    await looking.see_store()
    await looking.see_processes()
    assert recorded["queue_length", "sql"] == 7 and recorded["running_rollouts", "sql"] == 3
    assert recorded["store_rollouts", "sql", "succeeded"] == 4 and recorded["store_rollouts", "sql", "cancelled"] == 0
    assert len([key for key in recorded if key[0] == "store_rollouts"]) == len(get_args(RolloutStatus))
    assert recorded["store_bytes", "sql"] == 5000 and recorded["disk_free_bytes", "sql"] > 0
    assert recorded["runners", "sql"] == recorded["replicas", "sql", "policy"] == 2
    assert recorded["staleness_bound", "sql", "policy"] == 2
    assert {key[2]: value for key, value in recorded.items() if key[0] == "restarts"} == {
        "runner": 1,
        "trainer": 0,
        "replica": 0,
        "store": 0,
    }
    assert ("spans", "sql") not in recorded, "what there was before is not of this run's rate"

    run.known, run.stores, run.replicas = {**run.known, "spans": 130}, [12], ["b", "c"]
    await looking.see_store()
    await looking.see_processes()
    assert recorded["spans", "sql"] == 30
    assert recorded["restarts", "sql", "store"] == recorded["restarts", "sql", "replica"] == 1


async def test_progress_is_when_a_rollout_or_a_step_came_to_its_end(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = Run(tmp_path), 0.0
    monkeypatch.setattr(watch.time, "time", lambda: now)
    looking = RunWatch(run.watched)
    seen = []
    for now, ended, steps in ((10.0, 0, 0), (20.0, 0, 0), (30.0, 2, 0), (40.0, 2, 1), (50.0, 2, 1)):
        run.known["rollouts_by_status"], run.steps = {"succeeded": ended, "running": int(now)}, steps
        await looking.see_store()
        seen.append(recorded["last_progress_timestamp_seconds", "sql"])
    assert seen == [10.0, 10.0, 30.0, 40.0, 40.0]


async def test_a_store_that_is_away_hides_nothing_else(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WATCH_SECONDS", 0.0)
    run = Run(tmp_path)
    known, run.known = run.known, {}
    looking = asyncio.create_task(RunWatch(run.watched).run())
    async with asyncio.timeout(10):
        while ("restarts", "sql", "store") not in recorded:
            await asyncio.sleep(0)
        assert ("queue_length", "sql") not in recorded
        run.known = known
        while ("queue_length", "sql") not in recorded:
            await asyncio.sleep(0)
    looking.cancel()


def test_restarts_are_processes_beyond_the_most_at_once() -> None:
    restarts = Restarts()
    assert [restarts.see(present) for present in ("", "a", "ab", "abc", "ab", "bd", "bde")] == [0, 0, 0, 0, 0, 1, 2]


# Of replicas


def call(finish: str | None, **timing: float | None) -> dict[str, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "cached_tokens": 6 if finish else None}
    return {"prompt_ids": [1], "finish_reason": finish, "attributes": {"usage": usage, "timing": timing}}


def test_a_replica_counts_its_calls(recorded: Recorded) -> None:
    state = {"running": 3, "waiting": 1, "kv_cache_use": 0.5, "version": 7, "proved": False, "workers": 1}
    metrics = ReplicaMetrics({"run": "sql", "policy": "writer"}, "a1", lambda: state)
    calls = [call("stop", queue=0.01, first_token=0.2, total=1.0), call(None, queue=None, first_token=None, total=2.0)]
    metrics.note([*calls, {"name": "lightning_ray.image", "attributes": {}}])
    metrics.export(state, metrics._calls)
    tags = ("sql", "writer", "a1")
    assert recorded == {
        ("replica_running", *tags): 3.0,
        ("replica_waiting", *tags): 1.0,
        ("replica_cache_use", *tags): 0.5,
        ("replica_version", *tags): 7.0,
        ("replica_proved", *tags): 0.0,
        ("calls", *tags, "stop"): 1.0,
        ("calls", *tags, "broken_off"): 1.0,
        ("prompt_tokens", *tags): 20.0,
        ("cached_tokens", *tags): 6.0,
        ("answered_tokens", *tags): 8.0,
        ("call_seconds", *tags, "queue"): 1.0,
        ("call_seconds", *tags, "first_token"): 1.0,
        ("call_seconds", *tags, "total"): 2.0,
    }


async def test_each_call_is_exported_once(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ray.metrics.replica.REPORT_SECONDS", 0.0)
    metrics = ReplicaMetrics({"run": "sql", "policy": "policy"}, "a1", lambda: {"proved": True, "version": 1})
    metrics.note([call("stop", total=1.0)])
    reporting = asyncio.create_task(metrics.report())
    key = ("call_seconds", "sql", "policy", "a1", "total")
    async with asyncio.timeout(10):
        while key not in recorded:
            await asyncio.sleep(0.001)
        metrics.note([call("stop", total=1.0)])
        while recorded[key] < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
    reporting.cancel()
    assert recorded[key] == 2 and recorded["replica_proved", "sql", "policy", "a1"] == 1


# Of the relay


def test_upstreams_are_told_apart(recorded: Recorded) -> None:
    status = {**dict.fromkeys(("running", "waiting", "errors", "retries"), 0), "calls": 4, "money": 0.25}
    tokens = {"prompt_tokens": 100, "cached_tokens": 60, "completion_tokens": 30}
    export_status(
        Exporter(run="sql"), {"judge": {**status, **tokens, "max_spend": None}, "other": {**status, **tokens}}
    )
    assert recorded["relay_money", "sql", "judge"] == 0.25 and recorded["relay_calls", "sql", "other"] == 4
    assert recorded["relay_tokens", "sql", "judge", "cached"] == 60 and len(recorded) == 16


async def test_the_status_of_a_real_relay_has_all_of_it(recorded: Recorded) -> None:
    relay = RelayApp({"judge": lr.Upstream(base_url="http://127.0.0.1:9")}, b"s" * 32, lambda rows: asyncio.sleep(0))
    export_status(Exporter(run="sql"), await relay.status())
    assert recorded["relay_calls", "sql", "judge"] == 0 == recorded["relay_money", "sql", "judge"]
    await relay.close()
