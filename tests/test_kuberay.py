"""The manifests for KubeRay: they compose, operator and Kubernetes know every key, and they are what is promised."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ray.placement.places import Places
from lightning_ray.placement.settings import NODES_OF, ROLE_LABEL, Placement
from tests.cluster_file import ROOT
from tests.dockerfile import in_context
from tests.kuberay_schema import check, cluster_of
from tests.kustomize import Manifest, compose
from tests.network_policies import Pod, reaches

HOME = ROOT / "deployments" / "kuberay"
KINDS = ("interactive", "train", "serve")
FOLDERS = [*KINDS, *(f"gpu/{kind}" for kind in KINDS)]
SECRETS = {"redis": "password", "serving": "key"}
ANY_KEY = {"labels", "matchLabels", "requests", "limits", "rayStartParams", "annotations", "selector"}
"""Maps whose keys are the author's."""


def ray_of(folder: str) -> Manifest:
    """The manifest with the Ray cluster."""
    [found] = [each for each in compose(HOME / folder) if cluster_of(each) is not None]
    return found


def groups_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The head and the groups of workers, by name."""
    cluster = cluster_of(manifest)
    assert cluster is not None
    return {"head": cluster["headGroupSpec"], **{each["groupName"]: each for each in cluster["workerGroupSpecs"]}}


def pods_of(folder: str) -> dict[str, dict[str, Any]]:
    """Pod templates, by what they are."""
    found = {name: group["template"] for name, group in groups_of(ray_of(folder)).items()}
    others = [each for each in compose(HOME / folder) if each["kind"] == "StatefulSet"]
    return found | {each["metadata"]["name"]: each["spec"]["template"] for each in others}


def pod(folder: str, name: str) -> Pod:
    return Pod(pods_of(folder)[name]["metadata"]["labels"])


def keys(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all keys that a schema knows."""
    if isinstance(value, list):
        for place, each in enumerate(value):
            yield from keys(each, (*way, place))
    elif isinstance(value, dict) and not (way and way[-1] in ANY_KEY):
        for key, each in value.items():
            yield (*way, key)
            yield from keys(each, (*way, key))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_is_accepted(folder: str) -> None:
    manifests = compose(HOME / folder)
    for manifest in manifests:
        check(manifest)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names)
    assert {each["metadata"].get("namespace") for each in manifests if each["kind"] != "Namespace"} == {"lightning-ray"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_composes_the_same(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl here")
    done = subprocess.run([kubectl, "kustomize", HOME / folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def ordered(manifests: list[Manifest]) -> list[Manifest]:
        return sorted(manifests, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert ordered(list(yaml.safe_load_all(done.stdout))) == ordered(compose(HOME / folder))


@pytest.mark.parametrize("folder", KINDS)
def test_a_typo_in_any_key_is_refused(folder: str) -> None:
    tried = 0
    for manifest in compose(HOME / folder):
        for *way, key in keys(manifest):
            broken = copy.deepcopy(manifest)
            holder = broken
            for part in way:
                holder = holder[part]
            holder[f"{key}s"] = holder.pop(key)
            with pytest.raises((ValueError, KeyError)):
                check(broken)
                pytest.fail(f"{manifest['kind']} takes {'.'.join(map(str, way))}.{key}s")
            tried += 1
    assert tried > 250


@pytest.mark.parametrize("old, new", [("value: policy", "value: trainer"), ("containers/0", "containers/1")])
def test_a_patch_that_does_not_fit_is_told(tmp_path: Path, old: str, new: str) -> None:
    shutil.copytree(HOME, tmp_path / "kuberay")
    patch = tmp_path / "kuberay/components/gpu/rayjob.yaml"
    patch.write_text(patch.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"/spec/rayClusterSpec/"):
        compose(tmp_path / "kuberay/gpu/train")
    (tmp_path / "kuberay/base/runs.yaml").unlink()
    with pytest.raises(ValueError, match=r"runs\.yaml is named"):
        compose(tmp_path / "kuberay/train")


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_are_as_restricted_as_kubernetes_can_make_them(folder: str) -> None:
    for name, template in pods_of(folder).items():
        spec = template["spec"]
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, name
        own = spec["securityContext"]
        assert own["runAsNonRoot"] and own["runAsUser"] > 0, name
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for volume in spec.get("volumes", []):
            assert volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim"}, name
        for container in spec["containers"]:
            restricted(container)
        if name != "head":  # whose autoscaler talks to Kubernetes
            assert spec["automountServiceAccountToken"] is False, name
    cluster = cluster_of(ray_of(folder))
    assert cluster is not None and cluster["authOptions"] == {"mode": "token"}
    restricted(cluster["autoscalerOptions"])


def restricted(container: dict[str, Any]) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for which in ("requests", "limits"):
        assert {"cpu", "memory"} <= container["resources"][which].keys()
    gpus = {amounts.get("nvidia.com/gpu") for amounts in container["resources"].values()}
    assert len(gpus) == 1, "Kubernetes wants a GPU requested and limited alike"


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_mounted_is_there_and_what_is_written_to_can_be(folder: str) -> None:
    claims = {each["metadata"]["name"] for each in compose(HOME / folder) if each["kind"] == "PersistentVolumeClaim"}
    groups = groups_of(ray_of(folder))
    for name, group in groups.items():
        spec = group["template"]["spec"]
        volumes = {each["name"]: each for each in spec["volumes"]}
        [container] = spec["containers"]
        mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        assert {"/tmp", "/home/lightning", "/dev/shm"} <= mounts.keys(), name
        shared = mounts["/dev/shm"]["emptyDir"]
        room = int(shared["sizeLimit"].removesuffix("Gi")) * 2**30
        assert shared["medium"] == "Memory" and room > int(group["rayStartParams"]["object-store-memory"]), name
        assert ("/runs" in mounts) is (name != "runners"), name
        assert all(each["persistentVolumeClaim"]["claimName"] in claims for each in (mounts.get("/runs"),) if each)
    autoscaler = (cluster_of(ray_of(folder)) or {})["autoscalerOptions"]
    of_the_head = {each["name"] for each in groups["head"]["template"]["spec"]["volumes"]}
    assert {each["name"] for each in autoscaler["volumeMounts"]} <= of_the_head


@pytest.mark.parametrize("folder", FOLDERS)
def test_images_are_those_of_the_dockerfile_and_fit_their_pods(folder: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, group in groups_of(ray_of(folder)).items():
        [container] = group["template"]["spec"]["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        gpu = folder.startswith("gpu/")
        kind = "runner" if name == "runners" else "gpu" if gpu else "cpu"
        assert container["image"] == f"lightning-ray-{kind}:{version}", name
        assert (ROOT / f"requirements/{kind}.txt").is_file()
        assert gpus == (1 if gpu and name in ("policy", "trainer") else 0), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_say_what_they_are_for_and_start_as_ray_can(folder: str) -> None:
    import ray
    from ray.scripts.scripts import start

    cluster = cluster_of(ray_of(folder))
    assert cluster is not None and cluster["rayVersion"] == ray.__version__
    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    roles = {name: group["labels"][ROLE_LABEL] for name, group in groups_of(ray_of(folder)).items()}
    assert roles == {name: name.removesuffix("s") for name in roles}
    places = Places(Placement(), [{ROLE_LABEL: role} for role in roles.values()])
    for name, role in roles.items():
        if role in NODES_OF:
            assert [other for other in roles if places.allows(role, {ROLE_LABEL: roles[other]})] == [name]
    for name, group in groups_of(ray_of(folder)).items():
        assert group["rayStartParams"].keys() <= known, name
        assert group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == roles[name]
        assert group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0), name
    if "runners" in roles:
        runners = groups_of(ray_of(folder))["runners"]
        assert runners["minReplicas"] == 0 < runners["maxReplicas"] and cluster["enableInTreeAutoscaling"]
        assert cluster["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("folder", ["train", "gpu/train"])
def test_a_job_s_command_is_one_that_there_is_and_goes_on_where_it_was(folder: str, tmp_path: Path) -> None:
    from lightning_ray.cli import parser
    from lightning_ray.config import EngineSettings
    from lightning_ray.launch import parse_setting

    entrypoint = ray_of(folder)["spec"]["entrypoint"].replace("/runs", str(tmp_path))

    def words() -> list[str]:
        """As the shell that runs the job sees them."""
        told = ["bash", "-c", f"printf '%s\\n' {entrypoint}"]
        return subprocess.run(told, capture_output=True, text=True, timeout=10).stdout.splitlines()

    command, *arguments = words()
    given = parser().parse_args(arguments)
    assert command == "lightning-ray" and str(given.runs_dir) == str(tmp_path) and not given.resume
    script = str(given.path.relative_to("/app"))
    assert (ROOT / script / "train.py").is_file() and in_context(script, (ROOT / ".dockerignore").read_text())
    settings = dict(parse_setting(text) for text in given.set)
    assert settings.get("algorithm.engine.device", "cpu") == ("cuda" if folder.startswith("gpu") else "cpu")
    assert settings["algorithm.engine.host"] == "0.0.0.0"  # agents are in other pods
    EngineSettings(**{key.removeprefix("algorithm.engine."): value for key, value in settings.items()})
    (tmp_path / given.name / "checkpoints").mkdir(parents=True)
    (tmp_path / given.name / "checkpoints" / "latest").touch()
    assert words() == [command, *arguments, "--resume"]


@pytest.mark.parametrize("folder", ["serve", "gpu/serve"])
def test_what_is_served_is_an_application_that_there_is(folder: str) -> None:
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    from deployments.serving import KEY_VARIABLE, ServingSettings, app

    config = ServeDeploySchema.model_validate(yaml.safe_load(ray_of(folder)["spec"]["serveConfigV2"]))
    [application] = config.applications
    assert import_attr(application.import_path) is app
    settings = ServingSettings.model_validate(application.args)
    assert settings.model.startswith("/runs/")
    assert settings.engine.device == ("cuda" if folder.startswith("gpu") else "cpu")
    pods = groups_of(ray_of(folder))["policy"]
    assert (settings.engine.replicas, settings.engine.max_replicas) == (pods["minReplicas"], pods["maxReplicas"])
    [container] = pods["template"]["spec"]["containers"]
    assert [each["name"] for each in container["env"]] == [KEY_VARIABLE]
    assert container["ports"] == [{"name": "serve", "containerPort": config.http_options.port}]


@pytest.mark.parametrize("folder", FOLDERS)
def test_secrets_are_made_by_who_deploys_and_it_is_said_how(folder: str) -> None:
    manifests = compose(HOME / folder)
    assert not [each for each in manifests if each["kind"] == "Secret"]
    asked = set(re.findall(r"secretKeyRef: \{'?key'?: '?(\w+)'?, '?name'?: '?(\w+)'?\}", flow(manifests)))
    wanted = {"train": set(), "interactive": {"redis"}, "serve": {"redis", "serving"}}[folder.removeprefix("gpu/")]
    assert {name for _, name in asked} == wanted and all(SECRETS[name] == key for key, name in asked)
    how = "".join(file.read_text() for file in HOME.glob("*/kustomization.yaml"))
    for name in wanted:
        assert f"create secret generic {name} --from-literal={SECRETS[name]}=" in how


def flow(manifests: list[Manifest]) -> str:
    return yaml.safe_dump(manifests, default_flow_style=True, width=10**6)


def test_redis_is_asked_for_where_a_cluster_stays_and_opened_by_its_password() -> None:
    for folder in ("interactive", "serve"):
        cluster = cluster_of(ray_of(folder))
        assert cluster is not None
        host, _, port = cluster["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
        [service] = [each for each in compose(HOME / folder) if each["kind"] == "Service"]
        assert service["metadata"]["name"] == host and service["spec"]["ports"][0]["port"] == int(port)
        redis = pods_of(folder)["redis"]
        assert redis["metadata"]["labels"] == service["spec"]["selector"]
    [container] = redis["spec"]["containers"]
    [*shell, script] = container["command"]
    assert shell == ["sh", "-c"] and "requirepass $REDIS_PASSWORD" in script
    assert "$REDIS_PASSWORD" not in shlex.split(script.splitlines()[0])  # arguments are read by everyone
    printed = script.replace("redis-server - --dir /data --appendonly yes", "cat")
    environment = {"REDIS_PASSWORD": "p", "PATH": "/usr/bin:/bin"}
    told = subprocess.run(["sh", "-c", printed], env=environment, capture_output=True, text=True, timeout=10)
    assert told.stdout == "requirepass p\n"


def test_only_who_needs_to_reaches_a_pod() -> None:
    policies = [each for each in compose(HOME / "serve") if each["kind"] == "NetworkPolicy"]
    head, policy, redis = (pod("serve", name) for name in ("head", "policy", "redis"))
    runner = pod("interactive", "runners")
    stranger = Pod({"app": "other"}, "other")
    client = Pod({"lightning-ray/client": "true"}, "other")
    operator = Pod({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay")
    dns, outside = Pod({"k8s-app": "kube-dns"}, "kube-system"), Pod(outside=True)
    allowed = [(runner, policy, 8000), (policy, head, 6379), (operator, head, 8265), (head, redis, 6379)]
    allowed += [(client, policy, 8000), (head, outside, 443)]
    refused = [(stranger, head, 8265), (stranger, policy, 8000), (client, head, 8265), (client, policy, 6379)]
    refused += [(runner, redis, 6379), (policy, redis, 6379), (stranger, redis, 6379), (operator, head, 6379)]
    refused += [(runner, outside, 443), (policy, outside, 443), (redis, outside, 443), (redis, head, 6379)]
    for source, target, port in allowed:
        assert reaches(policies, source, target, port), (source, target, port)
    for source, target, port in refused:
        assert not reaches(policies, source, target, port), (source, target, port)
    assert reaches(policies, runner, dns, 53, "UDP") and not reaches(policies, runner, dns, 443)


def test_agents_reach_the_internet_where_it_is_asked_for() -> None:
    policies = [each for each in compose(HOME / "gpu/train") if each["kind"] == "NetworkPolicy"]
    runner, trainer = pod("gpu/train", "runners"), pod("gpu/train", "trainer")
    assert reaches(policies, runner, Pod(outside=True), 443)
    assert not reaches(policies, runner, Pod(outside=True), 80)
    assert not reaches(policies, trainer, Pod(outside=True), 443)
    [internet] = [each for each in policies if each["metadata"]["name"] == "internet"]
    [rule] = internet["spec"]["egress"]
    [block] = [each["ipBlock"] for each in rule["to"]]
    assert "169.254.0.0/16" in block["except"], "a cloud's metadata"
