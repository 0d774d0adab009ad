"""On-policy distillation: the policy plays, and a teacher says of every token that it sampled how likely it was.

A token's advantage is log p_teacher - log p_policy of it: the policy is trained towards the teacher on its own
conversations, where it errs, and not on the teacher's. It is the reverse divergence KL(policy | teacher) of single
tokens that falls (Agarwal et al., 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated
Mistakes", arXiv:2306.13649; Lu, 2025, "On-Policy Distillation", Thinking Machines Lab). No reward is needed; with
``reward_weight`` the advantages of rewards are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr, model_validator

from lightning_ray.algorithms.grpo import GRPO
from lightning_ray.relay.settings import Upstream
from lightning_ray.trajectories.settings import Keep

if TYPE_CHECKING:
    import pyarrow as pa

    from lightning_ray.run.phases import PhaseClock
    from lightning_ray.run.run import Run
    from lightning_ray.teacher import Teacher
    from lightning_ray.trajectories.account import Account
    from lightning_ray.trajectories.episode import Episode


class Distill(GRPO):
    """Settings of a run of on-policy distillation: GRPO's, and a teacher."""

    teacher: Upstream
    """A model with the policy's tokenizer, behind an endpoint that gives the log probabilities of a prompt (vLLM's
    server, for one) of the longest row and one token more."""
    teacher_weight: float = Field(default=1.0, gt=0)
    """Of the teacher's part in a token's advantage."""
    reward_weight: float = Field(default=0.0, ge=0)
    """Of the rewards' part; without it rollouts need no reward, and groups no comparison."""
    group_size: int = Field(default=1, ge=1)

    _teacher: Any = PrivateAttr(default=None)
    _run: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _compares_groups(self) -> Distill:
        if self.reward_weight and self.group_size < 2:
            raise ValueError(
                f"reward_weight={self.reward_weight:g} compares the rollouts of a task: set group_size to 2 or more "
                f"(it is {self.group_size}), or reward_weight=0 to learn from the teacher alone"
            )
        return self

    def settle(self, episodes: Sequence[Episode], group_of: Mapping[str, str], oldest_version: int | None) -> Account:
        """As GRPO if rewards count; otherwise every rollout that sampled something."""
        if self.reward_weight:
            return super().settle(episodes, group_of, oldest_version)
        from lightning_ray.trajectories.keeping import keep_best

        return keep_best(episodes, group_of, Keep(), self.batch, oldest_version)

    async def scored(self, batch: pa.Table, clock: PhaseClock) -> pa.Table:
        """The batch with the teacher's log probabilities (``teacher_logprobs``)."""
        from lightning_ray.threads import in_thread

        with clock.phase("teacher"):
            if self._run is not None:
                await in_thread(self._check_tokenizer, self._run.policy.model)
            return await in_thread(with_teacher, batch, self._teacher)

    def check(self, run: Run) -> None:
        """Beside what GRPO needs the teacher must be there."""
        super().check(run)
        from lightning_ray.teacher import Teacher

        self._teacher = Teacher(self.teacher)
        if isinstance(self.model, str | Path):
            self._check_tokenizer(Path(self.model))
        else:  # the model is not there yet: its tokenizer is looked at before the first update
            self._teacher.logprobs([[0, 0]])
            self._run = run

    def _check_tokenizer(self, model: Path) -> None:
        from lightning_ray.conversations.rendering import load_tokenizer

        self._teacher.check_tokenizer(load_tokenizer(model))
        self._run = None

    def settings(self) -> dict[str, Any]:
        """The fields, without the teacher's secrets."""
        return {**super().settings(), "teacher": self.teacher.model_dump(mode="json")}


def with_teacher(batch: pa.Table, teacher: Teacher) -> pa.Table:
    """The batch with a column ``teacher_logprobs``, as long in each row as ``token_ids``."""
    import pyarrow as pa

    told = teacher.logprobs(batch["token_ids"].to_pylist())
    return batch.append_column("teacher_logprobs", pa.array(told, pa.list_(pa.float32())))
