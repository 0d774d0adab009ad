"""Placement: what a run asks for has a place on some nodes or is refused with what to change; labels as in Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_ray as lr
from lightning_ray.config import EngineSettings, build
from lightning_ray.errors import ConfigError
from lightning_ray.launch import Launch
from lightning_ray.placement.asks import Ask, Wanted
from lightning_ray.placement.heard import check_heard
from lightning_ray.placement.packing import missing
from lightning_ray.placement.places import Places
from lightning_ray.placement.room import check
from lightning_ray.placement.settings import ROLE_LABEL, Placement, matches
from lightning_ray.placement.view import Node, NodeType, View, types_of

ROOT = Path(__file__).resolve().parent.parent
HEAD, RUNNER, GPU = ({ROLE_LABEL: value} for value in ("head", "runner", "gpu"))


def node(cpus: float, gpus: float = 0, labels: dict[str, str] | None = None, free: float | None = None) -> Node:
    total = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return Node("10.0.0.1", total, total if free is None else {**total, "CPU": free}, labels or {})


def ask(count: int, *bundles: dict[str, float], strategy: str = "PACK", **selector: str) -> Ask:
    return Ask("trainer", count, bundles, selector, strategy)


@pytest.mark.parametrize(
    ("selector", "labels", "does"),
    [
        ({}, {}, True),
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": "x"}, {}, False),
        ({"a": "in(x, y)"}, {"a": "y"}, True),
        ({"a": "!x"}, {"a": "y"}, True),
        ({"a": "!in(x,y)"}, {"a": "y"}, False),
        ({"a": "x", "b": "z"}, {"a": "x"}, False),
    ],
)
def test_a_selector_matches_as_rays_does(selector: dict[str, str], labels: dict[str, str], does: bool) -> None:
    assert matches(labels, selector) == does


def test_roles_go_by_label_only_where_there_are_such_nodes() -> None:
    assert [Places().selector(role) for role in ("store", "runner", "policy", "trainer")] == [{}] * 4
    labelled = Places(None, [HEAD, GPU])
    assert labelled.selector("trainer") == labelled.selector("policy") == GPU
    assert labelled.selector("runner") == {} and labelled.selector("store") == HEAD
    both = Places(None, [GPU, {ROLE_LABEL: "trainer"}])
    assert both.selector("trainer") == {ROLE_LABEL: "in(trainer, gpu)"} and both.selector("policy") == GPU
    assert both.allows("trainer", GPU) and not both.allows("trainer", HEAD)


def test_a_users_word_wins() -> None:
    placement = Placement(trainer={"label": "any"}, policy={"label": "disk=fast"}, runner={"label": "!gpu", "cpus": 0})  # type: ignore[arg-type]
    places = Places(placement, [GPU])
    assert (places.selector("trainer"), places.selector("policy")) == ({}, {"disk": "fast"})
    assert places.runner() == {"num_cpus": 0, "scheduling_strategy": "SPREAD", "label_selector": {ROLE_LABEL: "!gpu"}}
    with pytest.raises(ConfigError, match=r"placement\.trainer\.label='in\(': .*a label is a value like gpu"):
        build(Placement, {"trainer": {"label": "in("}}, "placement")


def test_the_command_line_reaches_every_setting() -> None:
    settings: dict[str, Any] = {"placement.trainer.label": "gpu", "placement.ranks": "strict-spread"}
    made = Launch(settings=settings).placement(Placement(trainer={"cpus": 2}))  # type: ignore[arg-type]
    assert (made.trainer.label, made.trainer.cpus, made.ranks) == ("gpu", 2, "strict-spread")
    assert Launch(settings={"placement.runner.cpus": 0.1}).placement({"wait_seconds": 5}).wait_seconds == 5
    with pytest.raises(ConfigError, match=r"placement\.trainer\.lable='gpu'.*did you mean 'label'"):
        Launch(settings={"placement.trainer.lable": "gpu"}).placement(None)


def test_what_serve_is_asked_for() -> None:
    places = Places(Placement(policy={"cpus": 0.5}), [GPU])  # type: ignore[arg-type]
    assert places.replica(EngineSettings()) == {"ray_actor_options": {"num_cpus": 0.5, "label_selector": GPU}}
    options = places.replica(EngineSettings(device="cuda", tensor_parallel=2))
    assert options["placement_group_bundles"] == [{"CPU": 0.5}, *[{"CPU": 0.5, "GPU": 1.0}] * 2]
    assert options["placement_group_bundle_label_selector"] == [GPU] * 3
    assert options["ray_actor_options"] == {"num_cpus": 0.5}


@pytest.mark.parametrize(
    ("asks", "nodes", "lacking"),
    [
        ([ask(1, {"CPU": 1}, {"CPU": 1})], [node(2)], 0),
        ([ask(1, {"CPU": 1}, {"CPU": 1}), ask(1, {"CPU": 0.5})], [node(2)], 1),
        ([ask(2, {"CPU": 1}, {"CPU": 1}, strategy="STRICT_PACK")], [node(3), node(3)], 0),
        ([ask(2, {"CPU": 1}, {"CPU": 1}, strategy="STRICT_PACK")], [node(3), node(1)], 1),
        ([ask(1, {"CPU": 1}, {"CPU": 1}, strategy="STRICT_SPREAD")], [node(4)], 1),
        ([ask(1, {"CPU": 1}, {"CPU": 1}, strategy="STRICT_SPREAD")], [node(1), node(1)], 0),
        ([ask(1, {"CPU": 1}, **GPU)], [node(8)], 1),
        ([ask(1, {"CPU": 1}, **GPU)], [node(8), node(1, 1, GPU)], 0),
        ([ask(1, {"CPU": 2})], [node(8, free=1)], 1),
        ([ask(3, {"CPU": 0.1})], [node(0.3)], 0),
        ([ask(64, {"CPU": 0.5})], [node(16), node(16)], 0),
    ],
)
def test_what_has_no_place_is_found(asks: list[Ask], nodes: list[Node], lacking: int) -> None:
    assert sum(count for _, count in missing(asks, nodes)) == lacking


def test_nothing_is_refused_that_has_a_place() -> None:
    """3 and 3, 2 and 2 and 2: putting each where it leaves least ends in a dead end, as after 3 + 2 no 3 fits."""
    bundles = [{"CPU": size, "GPU": 1} for size in (3, 3, 2, 2, 2)]
    assert not missing([ask(1, *bundles)], [node(6, 2), node(6, 3)])
    assert missing([ask(1, *bundles, {"CPU": 1})], [node(6, 2), node(6, 3)])
    mixed = [ask(1, {"CPU": 4}), ask(2, {"CPU": 1, "GPU": 1})]
    assert not missing(mixed, [node(4, 2), node(4)]), "the node with GPUs is left to those that need them"


def test_a_hundred_nodes_and_a_thousand_runners_take_no_time() -> None:
    asks = [Ask("runner", 1000, ({"CPU": 0.5},)), ask(1, *[{"CPU": 1, "GPU": 1}] * 64)]
    nodes = [node(16) for _ in range(40)] + [node(16, 8, GPU) for _ in range(8)]
    assert not missing(asks, nodes)
    assert missing([*asks, Ask("runner", 1000, ({"CPU": 0.5},))], nodes)


def test_a_run_that_fits_goes_on_and_one_that_must_wait_is_told_apart() -> None:
    asks = [ask(1, {"CPU": 2})]
    assert check(asks, View([node(2)]))
    assert not check(asks, View([node(2, free=1)])), "others may leave"
    assert not check(asks, View([node(1)], [NodeType("more", {"CPU": 2}, {}, 3)])), "a node may be added"
    assert not check(asks, View([node(1)], unknown=True)), "nobody knows what may be added"


def test_a_refusal_says_what_is_asked_what_there_is_and_what_to_change() -> None:
    wanted = Wanted({"policy": EngineSettings(replicas=2)}, {"policy": 2}, runners=2)
    view = View([node(2, labels=HEAD)], [NodeType("gpus", {"CPU": 1.0, "GPU": 4.0}, GPU, 1)])
    asks = wanted.asks(Placement(), view.labels())
    with pytest.raises(ConfigError) as refused:
        check(asks, view)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("the run has no place on this cluster: ")
    assert f"  trainer: 1 x [2 x (CPU 1)] on nodes with {ROLE_LABEL} gpu" in lines
    assert f"  policy: 2 x (CPU 1) on nodes with {ROLE_LABEL} gpu" in lines
    assert "  runner: 2 x (CPU 0.5)" in lines
    assert f"  CPU 2 free of 2, {ROLE_LABEL} head (10.0.0.1)" in lines
    assert f"  up to 1 x gpus: CPU 1, GPU 4, {ROLE_LABEL} gpu" in lines
    assert "ranks, placement.trainer.cpus" in lines[-1] and "engine.replicas" in lines[-1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (ask(1, {"CPU": 1}, **GPU), "ray start --labels lightning-ray/role=gpu"),
        (ask(1, {"CPU": 1}, **{ROLE_LABEL: "in(trainer, gpu)"}), "ray start --labels lightning-ray/role=trainer)"),
        (ask(1, {"CPU": 1, "GPU": 1}), "no node for trainer has GPU 1: add a node with one, or set engine.device=cpu"),
        (ask(1, {"CPU": 4}), "no node for trainer has CPU 4: lower ranks"),
        (ask(1, {"CPU": 1}, {"CPU": 1}, strategy="STRICT_SPREAD"), "set placement.ranks=pack"),
        (ask(3, {"CPU": 1}), "ask for less for trainer"),
    ],
)
def test_what_to_change_fits_what_is_missing(asked: Ask, words: str) -> None:
    with pytest.raises(ConfigError, match=r"to change: ") as refused:
        check([asked], View([node(2)]))
    assert words in str(refused.value)


def test_what_the_autoscaler_could_add_is_read_from_its_file() -> None:
    config = {
        "max_workers": 12,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 8}},
            "runners": {"max_workers": 8, "resources": {"CPU": 16}, "labels": RUNNER},
            "gpus": {"resources": {"CPU": 48, "GPU": 4}},
        },
    }
    assert types_of(config) == [
        NodeType("runners", {"CPU": 16.0}, RUNNER, 8),
        NodeType("gpus", {"CPU": 48.0, "GPU": 4.0}, {}, 12),
    ]


def test_the_groups_of_the_manifests_for_kuberay_are_where_the_roles_go() -> None:
    kuberay = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    spec = yaml.safe_load((ROOT / "deployments/kuberay/interactive/raycluster.yaml").read_text())["spec"]
    metadata = {"name": "train", "namespace": "lightning-ray"}
    config = kuberay._derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
    types = types_of(config)
    assert all(kind.resources["CPU"] >= 1 for kind in types)
    places = Places(None, [kind.labels for kind in types])
    wanted = {role: places.selector(role)[ROLE_LABEL] for role in ("runner", "policy", "trainer")}
    assert wanted == {"runner": "runner", "policy": "policy", "trainer": "trainer"}


def test_a_ray_of_ones_own_counts_as_many_cpus_as_the_run_takes() -> None:
    wanted = Wanted({"policy": EngineSettings(max_replicas=3)}, {"policy": 2}, runners=2, most_runners=40)
    assert wanted.cpus(Placement()) == 3 + 2 + 20
    assert lr.Placement is Placement


def test_a_policy_on_loopback_is_refused_where_runners_may_be_elsewhere() -> None:
    def on(address: str, name: str, labels: dict[str, str] | None = None, cpus: float = 4) -> Node:
        return Node(address, {"CPU": cpus}, {"CPU": cpus}, labels or {}, name)

    head, same, other = on("10.0.0.1", "a", HEAD), on("10.0.0.1", "b", RUNNER), on("10.0.0.2", "c", RUNNER)
    wanted = Wanted(engines={"only": EngineSettings()}, ranks={"only": 1}, runners=1)

    def check_of(*nodes: Node, engine: EngineSettings | None = None) -> None:
        asks = wanted.asks(Placement(), [each.labels for each in nodes])
        check_heard("engine.host", [(engine or EngineSettings()).host], asks, nodes, "a")

    check_of(head)
    check_of(head, same)
    check_of(head, on("10.0.0.2", "c", RUNNER, cpus=0))
    check_of(head, same, on("10.0.0.2", "c", GPU))
    check_of(head, other, engine=EngineSettings(host="0.0.0.0"))
    asks = wanted.asks(Placement(), [HEAD, RUNNER])
    with pytest.raises(ConfigError, match=r"placement\.relay_host='127.* set placement\.relay_host='0\.0\.0\.0' where"):
        check_heard("placement.relay_host", [Placement().relay_host], asks, [head, other], "a")
    for host in ("127.0.0.1", "localhost", "::1"):
        with pytest.raises(
            ConfigError, match=r"engine\.host='.*' is heard on this node \(10\.0\.0\.1\) alone, .* 10\.0\.0\.2"
        ):
            check_of(head, other, engine=EngineSettings(host=host))
