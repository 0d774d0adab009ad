"""What the KubeRay operator (1.5) takes, as far as the manifests use it, and Kubernetes' own schemas; unknown keys are
refused by both.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal

from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from referencing import Registry, Resource

SCHEMAS = "kubernetes-json-schema/v1.30.0-local-strict"


@functools.cache
def validator(kind: str, api: str) -> Draft202012Validator:
    """Kubernetes' own schema of a kind, which knows no other keys than its own."""
    name = f"{kind.lower()}-{re.sub(r'[.][^/]*/|/', '-', api)}"
    schema, definitions = (schema_contents(f"{SCHEMAS}/{file}.json", "1.30") for file in (name, "_definitions"))
    registry: Registry[Any] = Resource.from_contents(definitions) @ (Resource.from_contents(schema) @ Registry())
    return Draft202012Validator(schema, registry=registry)


def kubernetes(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest. Raises ValueError for what Kubernetes does not know."""
    for error in validator(manifest["kind"], manifest["apiVersion"]).iter_errors(manifest):
        raise ValueError(f"{'.'.join(map(str, error.path))}: {error.message}")
    return manifest


def _pod(template: dict[str, Any]) -> dict[str, Any]:
    kubernetes({"apiVersion": "v1", "kind": "Pod", **template})
    return template


def _container(part: dict[str, Any]) -> dict[str, Any]:
    _pod({"metadata": {}, "spec": {"containers": [{"name": "any", **part}]}})
    return part


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod)]


class Strict(BaseModel):
    """Knows its fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: str | None = None


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    env: list[dict[str, Any]] | None = None
    resources: dict[str, Any] | None = None
    securityContext: dict[str, Any] | None = None
    volumeMounts: list[dict[str, Any]] | None = None

    def model_post_init(self, _: Any) -> None:
        """A part of a container."""
        _container(self.model_dump(include={"env", "resources", "securityContext", "volumeMounts"}, exclude_none=True))


class RedisCredential(Strict):
    value: str | None = None
    valueFrom: dict[str, Any] | None = None

    def model_post_init(self, _: Any) -> None:
        """As a variable of a container."""
        _container({"env": [{"name": "ANY", **self.model_dump(exclude_none=True)}]})


class GcsFaultToleranceOptions(Strict):
    redisAddress: str
    redisUsername: RedisCredential | None = None
    redisPassword: RedisCredential | None = None
    externalStorageNamespace: str | None = None


class Group(Strict):
    """What head and workers have in common."""

    labels: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, str] = Field(default_factory=dict)
    rayStartParams: dict[str, str]
    template: PodTemplate


class HeadGroup(Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enableIngress: bool | None = None


class WorkerGroup(Group):
    groupName: str
    replicas: int | None = None
    minReplicas: int
    maxReplicas: int
    numOfHosts: int = 1
    idleTimeoutSeconds: int | None = None


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(default_factory=list)
    suspend: bool = False


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    runtimeEnvYAML: str | None = None
    backoffLimit: int = 0
    activeDeadlineSeconds: int | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = 0
    suspend: bool = False
    rayClusterSpec: RayClusterSpec


class RayServiceSpec(Strict):
    serveConfigV2: str
    excludeHeadPodFromServeSvc: bool = False
    rayClusterConfig: RayClusterSpec


SPECS: dict[str, type[Strict]] = {"RayCluster": RayClusterSpec, "RayJob": RayJobSpec, "RayService": RayServiceSpec}


def check(manifest: dict[str, Any]) -> None:
    """Raises ValueError for what the operator or Kubernetes would not take."""
    spec = SPECS.get(manifest["kind"])
    if spec is None:
        kubernetes(manifest)
        return
    if manifest["apiVersion"] != "ray.io/v1" or manifest.keys() != {"apiVersion", "kind", "metadata", "spec"}:
        raise ValueError(f"{manifest['kind']}: {sorted(manifest)} of {manifest['apiVersion']}")
    kubernetes({"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]})
    try:
        spec.model_validate(manifest["spec"])
    except ValidationError as error:
        raise ValueError(str(error)) from None


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The spec of the Ray cluster in it."""
    where: dict[str, str] = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    if manifest["kind"] not in SPECS:
        return None
    spec: dict[str, Any] = manifest["spec"]
    return spec[where[manifest["kind"]]] if manifest["kind"] in where else spec
