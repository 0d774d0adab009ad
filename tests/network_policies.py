"""Who reaches whom under some NetworkPolicies of one namespace, as Kubernetes defines it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Pod:
    """Of the policies' namespace unless it says otherwise; ``outside`` is no pod, but an address of the internet."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = "lightning-ray"
    outside: bool = False


def reaches(policies: Sequence[Policy], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether the source may leave for the target, and the target lets it in."""
    return _admits(policies, "Egress", source, target, port, protocol) and _admits(
        policies, "Ingress", target, source, port, protocol
    )


def _admits(policies: Sequence[Policy], way: str, own: Pod, other: Pod, port: int, protocol: str) -> bool:
    """Rules of all policies that select a pod add up; a pod that none selects is open."""
    if own.namespace != "lightning-ray" or own.outside:
        return True
    specs = [policy["spec"] for policy in policies]
    mine = [spec for spec in specs if way in spec["policyTypes"] and selects(spec["podSelector"], own.labels)]
    rules = [rule for spec in mine for rule in spec.get(way.lower(), [])]
    peers = "to" if way == "Egress" else "from"
    return not mine or any(_peer(rule.get(peers), other) and _port(rule.get("ports"), port, protocol) for rule in rules)


def _port(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    return ports is None or {"protocol": protocol, "port": port} in ports


def _peer(peers: Sequence[Mapping[str, Any]] | None, other: Pod) -> bool:
    if peers is None:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            if other.outside:
                return True
        elif not other.outside:
            namespaces = peer.get("namespaceSelector")
            home = {"kubernetes.io/metadata.name": other.namespace}
            near = other.namespace == "lightning-ray" if namespaces is None else selects(namespaces, home)
            if near and selects(peer.get("podSelector", {}), other.labels):
                return True
    return False


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects what has the labels."""
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return exact and all(labels.get(each["key"]) in each["values"] for each in expressions)
