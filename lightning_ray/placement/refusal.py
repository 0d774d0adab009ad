"""Why a run has no place: what it asks for, what the cluster has and could add, and what to change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lightning_ray.placement.asks import LESS, Ask, shown
from lightning_ray.placement.settings import ROLE_LABEL, matches
from lightning_ray.placement.view import COUNTED, Node, NodeType, View

SHOWN_NODES = 12
UNKNOWN = "what its autoscaler could add, if it has one, it does not tell"


def refusal(asks: Sequence[Ask], view: View, missing: Sequence[tuple[Ask, int]], waited: float = 0.0) -> str:
    """The whole message. ``waited`` seconds went by in vain."""
    lacking = ", ".join(f"{count} of {ask.count * ask.pieces} for {ask.title}" for ask, count in missing)
    after = f" after {waited:.0f} s of waiting for room" if waited else ""
    could = [f"  {_type(kind)}" for kind in view.types]
    lines = [
        f"the run has no place on this cluster{after}: {lacking}",
        "it asks for:",
        *(f"  {ask.title}: {ask}" for ask in asks),
        "the cluster has:",
        *nodes_shown(view.nodes),
        *(["it could add:", *could] if could else [UNKNOWN if view.unknown else "it adds no nodes by itself"]),
        "to change: " + "; or ".join(dict.fromkeys(advice(ask, view) for ask, _ in missing)),
    ]
    return "\n".join(lines)


def nodes_shown(nodes: Sequence[Node]) -> list[str]:
    """A line for each kind of node."""
    kinds = Counter(
        f"{_amounts(node.total, node.free)}{_role(node.labels)}"
        + ("" if len(nodes) > SHOWN_NODES else f" ({node.address})")
        for node in nodes
    )
    shown = kinds.most_common(SHOWN_NODES)
    lines = [f"  {count} x {kind}" if count > 1 else f"  {kind}" for kind, count in shown]
    more = len(nodes) - sum(count for _, count in shown)
    return [*lines, *([f"  and {more} more"] if more else [])]


def _amounts(total: Mapping[str, float], free: Mapping[str, float]) -> str:
    shown = [f"{name} {free.get(name, 0):g} free of {total[name]:g}" for name in COUNTED if total.get(name)]
    return ", ".join(shown) or "no CPU"


def _role(labels: Mapping[str, str]) -> str:
    return f", {ROLE_LABEL} {labels[ROLE_LABEL]}" if ROLE_LABEL in labels else ", no role"


def _type(kind: NodeType) -> str:
    amounts = ", ".join(f"{name} {kind.resources[name]:g}" for name in COUNTED if kind.resources.get(name))
    return f"up to {kind.most} x {kind.name}: {amounts or 'resources that its file does not tell'}{_role(kind.labels)}"


def _one_of(value: str) -> str:
    """A value that a selector's ``in(a, b)`` takes."""
    listed = re.fullmatch(r"in\((.*)\)", value)
    return listed.group(1).split(",")[0].strip() if listed else value


def advice(ask: Ask, view: View) -> str:
    """What would give an ask its place."""
    right = [node for node in view.grown(1) if matches(node.labels, ask.selector)]
    if not right:
        [(key, value)] = list(ask.selector.items())[:1]
        return (
            f"start a node with that label (ray start --labels {key}={_one_of(value)}), or let {ask.role} go to any "
            f"(--set placement.{ask.role}.label=any)"
        )
    for bundle in ask.bundles:
        if not any(all(node.total.get(name, 0) >= amount for name, amount in bundle.items()) for node in right):
            without = [name for name, amount in bundle.items() if all(n.total.get(name, 0) < amount for n in right)]
            gpus = "add a node with one, or set engine.device=cpu"
            lacks = shown({name: bundle[name] for name in without or bundle})
            return f"no node for {ask.role} has {lacks}: {gpus if 'GPU' in without else f'lower {LESS[ask.role]}'}"
    if ask.strategy == "STRICT_SPREAD" and len(right) < len(ask.bundles):
        return f"{len(ask.bundles)} ranks want a node each (placement.ranks): add nodes, or set placement.ranks=pack"
    return f"ask for less for {ask.role} ({LESS[ask.role]}), add nodes, or end what holds them"
