"""What a user says of placement. What is not said does the right thing on a laptop and on a labelled cluster."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field, field_validator

from lightning_ray.config import Settings

Role = Literal["store", "runner", "policy", "trainer"]
ROLE_LABEL = "lightning-ray/role"
"""The label of nodes that says what they are for (``ray start --labels lightning-ray/role=gpu``)."""
NODES_OF: Mapping[Role, tuple[str, ...]] = {
    "store": ("head",),
    "runner": ("runner",),
    "policy": ("policy", "gpu"),
    "trainer": ("trainer", "gpu"),
}
"""Values of the label where a role belongs. The store's nodes keep the run's folder."""
CPUS_OF: Mapping[Role, float] = {"store": 0.0, "runner": 0.5, "policy": 1.0, "trainer": 1.0}
_LABEL = re.compile(r"!?(in\([\w., -]+\)|[\w.-]+)|[\w./-]+=!?(in\([\w., -]+\)|[\w.-]+)")


class RolePlacement(Settings):
    """Where the processes of one role go."""

    label: str = "auto"
    """Of the nodes they may be on: a value of ``lightning-ray/role`` (``gpu``, ``in(trainer, gpu)``, ``!runner``), or
    ``key=value`` of another label; ``any`` for all nodes. ``auto`` is where the role belongs, if the cluster has such
    nodes or can add them, and otherwise any."""
    cpus: float | None = Field(default=None, ge=0)
    """CPUs of each process, as Ray counts them; by default 1 of a trainer rank and of a replica, 0.5 of a runner."""

    @field_validator("label")
    @classmethod
    def _readable(cls, label: str) -> str:
        if not _LABEL.fullmatch(label):
            raise ValueError("a label is a value like gpu, in(trainer, gpu) or !runner, or key=value; or auto, or any")
        return label


class Placement(Settings):
    """Where the parts of a run go: ``Trainer(placement=lr.Placement(...))``, ``--set placement.trainer.label=gpu``."""

    store: RolePlacement = RolePlacement()
    """The span store's shards, where there are several; a single one is beside the run's folder."""
    runner: RolePlacement = RolePlacement()
    policy: RolePlacement = RolePlacement()
    trainer: RolePlacement = RolePlacement()
    ranks: Literal["pack", "strict-pack", "spread", "strict-spread"] = "pack"
    """How a policy's trainer ranks share nodes: on few, on one, on many, each on its own."""
    relay_host: str = "127.0.0.1"
    """Where the relay listens in a run without a policy; beside one it listens where ``engine.host`` says."""
    wait_seconds: float = Field(default=900.0, ge=0)
    """How long a run waits for room: for nodes that the autoscaler adds, or that others leave."""

    def cpus(self, role: Role) -> float:
        """CPUs of a role's process."""
        own: RolePlacement = getattr(self, role)
        return CPUS_OF[role] if own.cpus is None else own.cpus

    def selector(self, role: Role, labels: Iterable[Mapping[str, str]]) -> dict[str, str]:
        """Ray's label selector of a role; ``labels`` are those of all nodes that there are or may be."""
        own: RolePlacement = getattr(self, role)
        if own.label == "any":
            return {}
        if own.label == "auto":
            there = {each[ROLE_LABEL] for each in labels if ROLE_LABEL in each}
            values = [value for value in NODES_OF[role] if value in there]
            return {ROLE_LABEL: values[0] if len(values) == 1 else f"in({', '.join(values)})"} if values else {}
        key, equals, value = own.label.partition("=")
        return {key: value} if equals else {ROLE_LABEL: own.label}


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is meant, as Ray has it."""
    return all(_matches(labels.get(key), wanted) for key, wanted in selector.items())


def _matches(value: str | None, wanted: str) -> bool:
    denied, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", wanted)
    values = [each.strip() for each in listed.group(1).split(",")] if listed else [wanted]
    return (value in values) != denied
