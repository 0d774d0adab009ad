"""Whether what a run asks for has a place on some nodes: a search over nodes for every bundle, the hardest first.

Invariant: ``missing`` is empty only if every bundle was put on a node with room and labels for it; and it names
something only if the search was through, so that no run is refused that Ray could place. Where it is not through after
``LOOKS`` looks, the asks count as placed: what then stays pending is told while the run waits for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_ray.placement.asks import Ask, Bundle, demand
from lightning_ray.placement.settings import matches
from lightning_ray.placement.view import Node

LOOKS = 50_000
TINY = 1e-6


@dataclass
class Room:
    """What is left on a node."""

    node: Node
    left: dict[str, float]
    units: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many bundles of a unit it has."""

    def fits(self, bundle: Bundle) -> bool:
        return all(self.left.get(name, 0.0) >= amount - TINY for name, amount in bundle.items())

    def put(self, bundle: Bundle, unit: tuple[int, int], times: int = 1) -> None:
        """Add the bundle, or with -1 take it away."""
        for name, amount in bundle.items():
            self.left[name] = self.left.get(name, 0.0) - times * amount
        self.units[unit] += times


@dataclass(frozen=True)
class Item:
    """A bundle to be placed, and the rooms whose labels are right."""

    ask: Ask
    bundle: Bundle
    unit: tuple[int, int]
    rooms: list[Room]
    apart: bool


class _Exhausted(Exception):
    """The search took too long."""


def missing(asks: Sequence[Ask], nodes: Iterable[Node], free: bool = True) -> list[tuple[Ask, int]]:
    """The asks that have no place, each with how many of its units or bundles; by what is free, or by what is there."""
    rooms = [Room(node, dict(node.free if free else node.total)) for node in nodes]
    items = _items(asks, rooms)
    left = _greedy(items)
    if not left:
        return []
    for room in rooms:
        room.left, room.units = dict(room.node.free if free else room.node.total), Counter()
    try:
        if not _too_much(items) and _search(items, [0]):
            return []
    except _Exhausted:
        return []
    counted = Counter(id(item.ask) for item in left)
    return [(ask, counted[id(ask)]) for ask in asks if counted[id(ask)]]


def _items(asks: Sequence[Ask], rooms: list[Room]) -> list[Item]:
    items = []
    for ask, unit in demand(asks):
        right = [room for room in rooms if matches(room.node.labels, ask.selector)]
        key = (id(ask), unit)
        bundles = ask.bundles
        if ask.strategy == "STRICT_PACK":
            names = {name for bundle in bundles for name in bundle}
            bundles = ({name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names},)
        items += [Item(ask, bundle, key, right, ask.strategy == "STRICT_SPREAD") for bundle in bundles]
    return sorted(items, key=lambda item: (len(item.rooms), -item.bundle.get("GPU", 0), -item.bundle.get("CPU", 0)))


def _candidates(item: Item) -> list[Room]:
    """Rooms for it, the fullest first, of those that are alike one."""
    found: dict[object, Room] = {}
    for room in item.rooms:
        if room.fits(item.bundle) and not (item.apart and room.units[item.unit]):
            alike = (frozenset(room.left.items()), frozenset(room.node.labels.items()), room.units[item.unit])
            found.setdefault(alike, room)
    return sorted(found.values(), key=lambda room: (room.left.get("GPU", 0), room.left.get("CPU", 0)))


def _greedy(items: Sequence[Item]) -> list[Item]:
    """Place each where it leaves least; those that found no place."""
    left = []
    for item in items:
        if candidates := _candidates(item):
            candidates[0].put(item.bundle, item.unit)
        else:
            left.append(item)
    return left


def _too_much(items: Sequence[Item]) -> bool:
    """Whether all, or those that go to the same nodes, ask for more of a resource than there is."""
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(tuple(id(room) for room in item.rooms), []).append(item)
    for group in (items, *groups.values()):
        rooms = {id(room): room for item in group for room in item.rooms}.values()
        asked = Counter[str]()
        for item in group:
            asked.update(item.bundle)  # type: ignore[arg-type]
        if any(amount > sum(room.left.get(name, 0.0) for room in rooms) + TINY for name, amount in asked.items()):
            return True
    return False


def _search(items: Sequence[Item], looks: list[int], place: int = 0) -> bool:
    """Whether the items from ``place`` on can all be placed."""
    if place == len(items):
        return True
    item = items[place]
    for room in _candidates(item):
        looks[0] += 1
        if looks[0] > LOOKS or place > 900:  # Python's stack has an end too
            raise _Exhausted
        room.put(item.bundle, item.unit)
        if _search(items, looks, place + 1):
            return True
        room.put(item.bundle, item.unit, -1)
    return False
