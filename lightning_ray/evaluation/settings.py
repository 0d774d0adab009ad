"""How an evaluation is played and read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lightning_ray.evaluation.figures import Scale
from lightning_ray.relay.settings import Prices

Sampling = Literal["greedy", "sampled", "agent"]


class EvaluationSettings(Prices):
    """See the module. The prices are those of a model that is served from a folder; endpoints have their own."""

    samples: int = Field(default=1, ge=1)
    """Rollouts of each task."""
    sampling: Sampling | None = None
    """``greedy`` (temperature 0), ``sampled`` (temperature 1, nothing cut off), or ``agent``: as its client asks. By
    default endpoints answer as the agent asks, other models greedily, or sampled where there are several samples."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals."""
    threshold: float = 1.0
    """The reward from which a rollout counts as a success."""
    pass_at: list[int] | None = None
    """The k of pass@k; by default 1, 2, 4, ... up to ``samples``, if there are several."""
    failed_reward: float | None = None
    """What a failure of the agent's own (an exception, a timeout, no reward) counts as. Without it such rollouts are
    left out, and the intervals reach as far as their rewards could move the figures; those that failed for the
    infrastructure always are."""
    seed: int | None = None
    """Each rollout samples with a seed of its own that follows from this one, the task and its place."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Of one rollout's attempt."""
    max_attempts: int = Field(default=2, ge=1)
    """Of a rollout whose attempts time out or are not heard of."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationSettings:
        for k in self.pass_at or ():
            if not 1 <= k <= self.samples:
                raise ValueError(f"pass_at={self.pass_at}: pass@{k} needs at least {k} samples of each task")
        return self

    @property
    def scale(self) -> Scale:
        """How rewards are read."""
        pass_at = self.pass_at
        if pass_at is None:
            pass_at = [] if self.samples == 1 else [2**i for i in range(self.samples.bit_length())]
        return Scale(self.confidence, self.threshold, tuple(pass_at), self.failed_reward)

    def chosen_sampling(self, endpoint: bool) -> Sampling:
        """``sampling``, with the default decided."""
        if self.sampling is not None:
            return self.sampling
        return "agent" if endpoint else "greedy" if self.samples == 1 else "sampled"
