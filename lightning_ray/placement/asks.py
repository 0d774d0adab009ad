"""What a run asks a cluster for, by role. Resources go by Ray's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.config import EngineSettings
from lightning_ray.placement.settings import Placement, Role

Bundle = Mapping[str, float]
STRATEGIES = {"pack": "PACK", "strict-pack": "STRICT_PACK", "spread": "SPREAD", "strict-spread": "STRICT_SPREAD"}
LESS: Mapping[Role, str] = {
    "store": "store_shards",
    "runner": "n_runners, placement.runner.cpus",
    "policy": "engine.replicas, placement.policy.cpus",
    "trainer": "ranks, placement.trainer.cpus",
}
"""By role, the settings that ask for less."""


@dataclass(frozen=True)
class Ask:
    """So many units of one role, each of some bundles that go together."""

    role: Role
    count: int
    bundles: tuple[Bundle, ...]
    """Of one unit: a runner, a replica, all trainer ranks of a policy."""
    selector: Mapping[str, str] = field(default_factory=dict)
    strategy: str = "PACK"
    """How the bundles of a unit share nodes, by Ray's names."""
    name: str = ""
    """Of the policy, where there are several."""

    def __str__(self) -> str:
        sizes = list(dict.fromkeys(map(shown, self.bundles)))
        each = " + ".join(f"{[shown(b) for b in self.bundles].count(size)} x ({size})" for size in sizes)
        many = f"{self.count} x [{each}]" if len(self.bundles) > 1 else f"{self.count} x ({sizes[0]})"
        where = "".join(f" on nodes with {key} {value}" for key, value in self.selector.items())
        how = {"STRICT_PACK": ", on one node", "STRICT_SPREAD": ", each on a node of its own"}.get(self.strategy, "")
        return f"{many}{where}{how if len(self.bundles) > 1 else ''}"

    @property
    def pieces(self) -> int:
        """Parts of a unit that find a place each for itself."""
        return 1 if self.strategy == "STRICT_PACK" else len(self.bundles)

    @property
    def title(self) -> str:
        """``trainer of writer``."""
        return f"{self.role} of {self.name}" if self.name else self.role


def shown(bundle: Bundle) -> str:
    """``CPU 1, GPU 0.5``."""
    return ", ".join(f"{name} {amount:g}" for name, amount in bundle.items() if amount) or "nothing that Ray counts"


def countable(bundle: Bundle) -> dict[str, float]:
    """A bundle as a placement group takes it: not of nothing, so of a sliver of CPU at least."""
    return {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}


def trainer_bundle(placement: Placement, gpus: float) -> dict[str, float]:
    """Of one trainer rank."""
    return {"CPU": placement.cpus("trainer")} | ({"GPU": gpus} if gpus else {})


def replica_bundles(placement: Placement, engine: EngineSettings) -> list[dict[str, float]]:
    """Of one replica: its own, and one for each worker where these have GPUs of their own."""
    cpus = {"CPU": placement.cpus("policy")}
    if engine.device == "cpu":
        return [cpus]
    if engine.world_size == 1:
        return [{**cpus, "GPU": engine.gpu_share}]
    return [cpus, *({**cpus, "GPU": 1.0} for _ in range(engine.world_size))]


@dataclass(frozen=True)
class Wanted:
    """The parts of a run, before it is known where nodes are: engines and ranks go by the policies' names."""

    engines: Mapping[str, EngineSettings] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    runners: int = 0
    most_runners: int = 0

    def cpus(self, placement: Placement) -> float:
        """In all, with as many runners as there may be."""
        engines = sum(
            (engine.max_replicas or engine.replicas) * sum(b["CPU"] for b in replica_bundles(placement, engine))
            for engine in self.engines.values()
        )
        runners = max(self.runners, self.most_runners) * placement.cpus("runner")
        return engines + runners + sum(self.ranks.values()) * placement.cpus("trainer")

    def asks(self, placement: Placement, labels: Sequence[Mapping[str, str]]) -> list[Ask]:
        """By role; ``labels`` are those of all nodes that there are or may be."""
        several = len(self.engines) > 1
        where: dict[Any, dict[str, str]] = {
            role: placement.selector(role, labels) for role in ("trainer", "policy", "runner")
        }
        asks = []
        for policy, ranks in self.ranks.items():
            bundle, named = trainer_bundle(placement, self.engines[policy].gpu_share), policy if several else ""
            strategy = STRATEGIES[placement.ranks]
            asks.append(Ask("trainer", 1, (bundle,) * ranks, where["trainer"], strategy, named))
        for policy, engine in self.engines.items():
            bundles = tuple(replica_bundles(placement, engine))
            asks.append(Ask("policy", engine.replicas, bundles, where["policy"], name=policy if several else ""))
        if self.runners:
            asks.append(Ask("runner", self.runners, ({"CPU": placement.cpus("runner")},), where["runner"]))
        return asks


def demand(asks: Iterable[Ask]) -> list[tuple[Ask, int]]:
    """Every unit of every ask, with its number."""
    return [(ask, unit) for ask in asks for unit in range(ask.count)]
