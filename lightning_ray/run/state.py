"""What a run knows of itself: kept with every checkpoint, so that a resume counts on; the summary is made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.errors import ConfigError

ONLY = "policy"
"""Name of the policy where there is one alone."""


@dataclass
class PolicyState:
    """Of one policy under training."""

    version: int = 0
    rollouts_trained: int = 0
    rollouts_dropped: dict[str, int] = field(default_factory=dict)
    swaps: int = 0
    """Those that came to a verdict: one that a dying trainer rank broke off is begun anew."""
    swaps_proved: int = 0
    swap_ms: list[float] = field(default_factory=list)
    max_logprob_diff: float = 0.0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    stale_tokens_beyond_bound: int = 0
    unproved_tokens_trained: int = 0


@dataclass
class RunState:
    """What a resume must know; counters run over the whole run."""

    step: int = 0
    rollouts: int = 0
    step_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    flow: dict[str, Any] = field(default_factory=dict)
    """Groups of rollouts on their way (``algorithms.flow``)."""
    trainer_restarts: int = 0
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``val.greedy_before`` and so on -> figures."""
    policies: dict[str, PolicyState] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunState:
        """The state that ``asdict`` made plain."""
        policies = {name: PolicyState(**known) for name, known in values["policies"].items()}
        return cls(**{**values, "policies": policies})

    def policy(self, name: str) -> PolicyState:
        """That of one policy."""
        return self.policies.setdefault(name, PolicyState())

    def check_policies(self, names: Iterable[str]) -> None:
        """Raises ConfigError unless it is of these policies: a resume goes on with those that it has the weights of."""
        if sorted(names := list(names)) != sorted(self.policies):
            raise ConfigError(
                f"--resume: the run trained {', '.join(self.policies)}, and is to go on with {', '.join(names)}; train "
                "the same policies, or begin a run whose models are the checkpoint's"
            )

    @property
    def version(self) -> int:
        """Of the only policy's weights; of several the first's."""
        return next(iter(self.policies.values()), PolicyState()).version

    def total(self, counter: str) -> int:
        """A counter of the policies, summed over them."""
        return sum(getattr(state, counter) for state in self.policies.values())

    @property
    def rollouts_dropped(self) -> dict[str, int]:
        """By reason, over the policies."""
        return dict(sum((Counter(state.rollouts_dropped) for state in self.policies.values()), Counter[str]()))
