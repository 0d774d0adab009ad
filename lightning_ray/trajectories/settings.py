"""How rollouts become the rows of a training batch: their level, their limits, their rewards, and what groups need."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from lightning_ray.config import Settings

Level = Literal["trajectory", "transition"]
GroupChoice = Literal["drop", "keep", "resample"]
PromptChoice = Literal["drop", "drop_rows"]
LengthChoice = Literal["drop", "drop_rows", "truncate"]


class GroupPolicy(Settings):
    """What becomes of a group that cannot teach. ``drop`` leaves it out; ``keep`` trains on it as on any other;
    ``resample`` leaves it out and has its task played again, by a whole group.
    """

    model_config = ConfigDict(frozen=True)

    alone: GroupChoice = "drop"
    """A group with one usable rollout. Kept, it has the advantage 0 where that compares within the group, as its own
    reward is all there is for a baseline; ``reinforce_plus_plus`` and ``reward`` compare with no group. A group with
    none is played again, too."""
    no_variance: GroupChoice = "drop"
    """A group whose rewards are all the same: its advantages are 0."""
    infrastructure: GroupChoice = "drop"
    """A rollout that failed for the infrastructure. ``drop`` leaves out the rollout and ``keep`` trains on it if it had
    calls and a reward by then, while its group goes on; ``resample`` leaves out the group."""


class OverlongPenalty(Settings):
    """DAPO's soft punishment of long responses (``shaping``): of a rollout's longest row, what follows its prompt."""

    model_config = ConfigDict(frozen=True)

    max_tokens: int = Field(ge=1)
    """The length from which the punishment is whole."""
    cache_tokens: int = Field(ge=1)
    """How much before that it begins."""
    penalty: float = Field(default=1.0, gt=0)
    """The whole punishment."""

    @model_validator(mode="after")
    def _fits(self) -> OverlongPenalty:
        if self.cache_tokens > self.max_tokens:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} is more than max_tokens={self.max_tokens}: every response would be "
                "punished; take a smaller cache"
            )
        return self


class BatchSettings(Settings):
    """See the module. Limits are in tokens of a row, None for none."""

    level: Level = "trajectory"
    """What a row is: calls joined where their prompts extend each other, or each call on its own, as in 0.3."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Of a row's first prompt."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """Of all that follows it: what was sampled, and the prompts between."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Of the whole row."""
    on_prompt_too_long: PromptChoice = "drop"
    """``drop`` leaves out the rollout, ``drop_rows`` only the row; the other rows keep the rollout's reward. A prompt
    is not cut: what was sampled follows from all of it."""
    on_response_too_long: LengthChoice = "drop"
    """``truncate`` keeps of the row what fits, up to the last sampled token."""
    on_too_long: LengthChoice = "drop"

    credit: Literal["final", "step"] = "final"
    """``step`` gives each call the reward that was emitted behind it, beside the rollout's."""
    reward_match: Literal["first_occurrence", "first_sibling"] = "first_occurrence"
    """How such a reward finds its call, as in Agent Lightning 0.3 (``RewardMatchPolicy``)."""
    reward_weights: dict[str, float] | None = None
    """Weights of the reward's dimensions by name, whose sum is trained on; the primary dimension alone without them. A
    rollout that lacks one of them has no reward. A reward that is a mere number has the dimension ``primary``."""
    overlong: OverlongPenalty | None = None

    groups: GroupPolicy = GroupPolicy()

    @field_validator("reward_weights")
    @classmethod
    def _weighs(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and (not weights or not all(math.isfinite(weight) for weight in weights.values())):
            raise ValueError('must be finite numbers by dimension, for instance {"correct": 1.0, "short": 0.1}')
        return weights


class Keep(Settings):
    """Which rollouts are good enough to imitate: all of these must hold."""

    model_config = ConfigDict(frozen=True)

    top_share: float = Field(default=1.0, gt=0, le=1)
    """Of each task's rollouts the best by reward, at least one; among equals the first."""
    min_reward: float | None = None
    """The least reward, weighted and shaped as ``BatchSettings`` have it."""
    filter: Callable[[Any], bool] | None = None
    """Called with each rollout (``lightning_ray.Episode``) that the others let pass; whether to keep it."""

    def needs_reward(self, members: int) -> bool:
        """Whether a rollout must have a reward, that is one of so many of its task."""
        return self.min_reward is not None or (self.top_share < 1 and members > 1)
