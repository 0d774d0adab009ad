"""How Ray and Serve are told where a part goes: the options of its actors, by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ray.config import EngineSettings
from lightning_ray.placement.asks import STRATEGIES, Ask, replica_bundles, trainer_bundle
from lightning_ray.placement.settings import Placement, Role, matches


class Places:
    """Of one run on one cluster; ``labels`` are those of all nodes that there are or may be."""

    def __init__(self, placement: Placement | None = None, labels: Sequence[Mapping[str, str]] = ()):
        self.placement = placement or Placement()
        self._labels = labels

    def selector(self, role: Role) -> dict[str, str]:
        """Ray's label selector."""
        return self.placement.selector(role, self._labels)

    def allows(self, role: Role, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels is meant for the role."""
        return matches(labels, self.selector(role))

    def runner(self) -> dict[str, Any]:
        """Options of a runner's actor."""
        options: dict[str, Any] = {"num_cpus": self.placement.cpus("runner"), "scheduling_strategy": "SPREAD"}
        return options | self._labelled("label_selector", self.selector("runner"))

    def ranks(self, ranks: int, gpus: float) -> Ask:
        """A policy's trainer ranks, together."""
        bundle = trainer_bundle(self.placement, gpus)
        return Ask("trainer", 1, (bundle,) * ranks, self.selector("trainer"), STRATEGIES[self.placement.ranks])

    def replica(self, engine: EngineSettings) -> dict[str, Any]:
        """Options of a policy's deployment."""
        first, *workers = replica_bundles(self.placement, engine)
        selector = self.selector("policy")
        actor: dict[str, Any] = {"num_cpus": first["CPU"]}
        if not workers:
            actor |= {"num_gpus": first["GPU"]} if first.get("GPU") else {}
            return {"ray_actor_options": actor | self._labelled("label_selector", selector)}
        bundles = [first, *workers]
        options = {"placement_group_bundles": bundles, "placement_group_strategy": "PACK", "ray_actor_options": actor}
        return options | self._labelled("placement_group_bundle_label_selector", [selector] * len(bundles), selector)

    @staticmethod
    def _labelled(option: str, value: Any, selector: Mapping[str, str] | None = None) -> dict[str, Any]:
        return {option: value} if (value if selector is None else selector) else {}
