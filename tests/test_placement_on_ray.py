"""Placement on a real Ray of two small nodes, one labelled: labels hold, room is waited for, folders are looked for."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.simulated import simulated_cluster
from lightning_ray.config import EngineSettings
from lightning_ray.errors import ConfigError, InfrastructureError
from lightning_ray.placement import room
from lightning_ray.placement import unseen as unseen_module
from lightning_ray.placement.asks import Ask, Wanted
from lightning_ray.placement.places import Places
from lightning_ray.placement.room import let_go, make_room, placed
from lightning_ray.placement.settings import ROLE_LABEL, Placement
from lightning_ray.placement.unseen import check_seen
from lightning_ray.placement.view import NodeType, View, look, nodes_now


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    folder = tempfile.mkdtemp(prefix="lr-")
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80_000_000, "temp_dir": folder}
    cluster = simulated_cluster(**head)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.add_node(num_cpus=2, object_store_memory=80_000_000, labels={ROLE_LABEL: "gpu"})
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def labels_of(group: Any) -> list[str | None]:
    nodes = {node["NodeID"]: node["Labels"].get(ROLE_LABEL) for node in ray.nodes()}
    return [nodes[node_id] for node_id in ray.util.placement_group_table(group)["bundles_to_node_id"].values()]


async def test_ranks_go_where_their_label_is_and_are_told_if_there_is_no_room(cluster: Any) -> None:
    view = look(joined=True)
    assert len(view.nodes) == 2 and not view.types
    places = Places(Placement(), view.labels())
    group = await placed(places.ranks(2, 0), 30)
    assert labels_of(group) == ["gpu", "gpu"]
    with pytest.raises(InfrastructureError, match="after 1 s of waiting for room: 1 of 1 for trainer") as late:
        await placed(places.ranks(1, 0), 1)
    assert "CPU 0 free of 2, lightning-ray/role gpu" in str(late.value)
    let_go(group)


async def test_runners_are_spread_over_the_nodes_of_their_label(cluster: Any) -> None:
    @ray.remote
    class Runner:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    places = Places(Placement.model_validate({"runner": {"label": "gpu", "cpus": 0.25}}))
    runners = [Runner.options(**places.runner()).remote() for _ in range(3)]  # type: ignore[attr-defined]
    there = NodeAffinitySchedulingStrategy(await runners[0].node.remote(), soft=True)
    moved = Runner.options(**{**places.runner(), "scheduling_strategy": there}).remote()  # type: ignore[attr-defined]
    labelled = {node["NodeID"] for node in ray.nodes() if node["Labels"].get(ROLE_LABEL) == "gpu"}
    assert {await runner.node.remote() for runner in (*runners, moved)} == labelled
    for runner in (*runners, moved):
        ray.kill(runner)


async def test_a_small_run_is_placed_or_refused_at_once(cluster: Any) -> None:
    notes: list[str] = []
    small = Wanted({"policy": EngineSettings()}, {"policy": 1}, runners=2)
    view = look(joined=False)
    await make_room(small.asks(Placement(), view.labels()), view, 30, notes.append)
    large = Wanted({"policy": EngineSettings()}, {"policy": 2}, runners=2)
    with pytest.raises(ConfigError, match=r"1 of 1 for policy[\s\S]*engine\.replicas, placement\.policy\.cpus"):
        await make_room(large.asks(Placement(), view.labels()), view, 30, notes.append)


async def test_room_is_waited_for_until_a_node_is_added(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "GRACE_SECONDS", -1.0)
    wanted = Ask("runner", 3, ({"CPU": 1},), {ROLE_LABEL: "runner"})
    view = View(nodes_now(), [NodeType("runners", {"CPU": 4}, {ROLE_LABEL: "runner"}, 2)])
    notes: list[str] = []
    with pytest.raises(ConfigError, match=r"after 1 s .*: 3 of 3 for runner[\s\S]*up to 2 x runners: CPU 4"):
        await make_room([wanted], view, 0.5, notes.append)
    waiting = asyncio.create_task(make_room([wanted], view, 60, notes.append))
    await asyncio.sleep(0.5)
    added = cluster.add_node(num_cpus=3, object_store_memory=80_000_000, labels={ROLE_LABEL: "runner"})
    await waiting
    assert all("waiting for room" in note and "3 x runner" in note for note in notes) and len(notes) == 2
    cluster.remove_node(added)


def test_nodes_that_do_not_see_a_folder_are_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, here = nodes_now(), ray.get_runtime_context().get_node_id()
    ask = Places(Placement(), [node.labels for node in nodes]).ranks(1, 0)
    check_seen(tmp_path, "the run's folder", [ask], nodes, here)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(unseen_module, "_write_token", lambda folder: "a-token-that-only-this-node-has")
    told = r"the run's folder .* is not on every node where trainer may go: .* does not see it\. Keep it on storage"
    with pytest.raises(ConfigError, match=told):
        check_seen(tmp_path, "the run's folder", [ask], nodes, "another")
