"""SFT: the policy imitates the best of what was played, or of what it is given; the loss is their likelihood.

Without ``data``, a step plays the training tasks with the policy, keeps the best rollouts, trains on the tokens that
were sampled in them, and swaps: rejection sampling fine-tuning with one step (Yuan et al., 2023, arXiv:2308.01825),
expert iteration with several (ReST, Gulcehre et al., 2023, arXiv:2308.08998; ReST-EM, Singh et al., 2024,
arXiv:2312.06585).
With ``data`` nothing is played: its rollouts or conversations are trained on, and a step is a pass over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from lightning_ray.algorithms.weights import WeightAlgorithm, check_tasks
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.trajectories.settings import BatchSettings, GroupPolicy, Keep

if TYPE_CHECKING:
    from lightning_ray.algorithms.source import Source
    from lightning_ray.run.phases import PhaseClock
    from lightning_ray.run.run import Run
    from lightning_ray.trajectories.account import Account
    from lightning_ray.trajectories.episode import Episode


class SFT(WeightAlgorithm):
    """Settings of a run of supervised fine-tuning. The loss of a minibatch is the negative log-likelihood of the tokens
    that are trained on: their mean (``loss_aggregation="token-mean"``), or the mean over rollouts of each one's mean
    (``"rollout-mean"``).
    """

    data: tuple[Path, ...] = ()
    """What is imitated, if it is not played: folders of runs, whose training rollouts are read from their stores, and
    JSONL files of conversations (``messages``, optionally ``tools``), rendered by the model's chat template."""
    data_policy: str | None = None
    """Whose calls of a run in ``data`` that had several policies; by default the first's that was trained."""
    keep: Keep = Keep(top_share=0.25)
    """Which rollouts are trained on."""
    steps: int = Field(default=1, ge=0)
    """Rounds: each plays, keeps, trains and swaps; with ``data``, each trains and swaps."""
    prompts_per_step: int | None = Field(default=None, ge=1)
    """Tasks of a step, or with ``data`` tasks and conversations; without it all of them."""
    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises linearly; there may be few of them in all."""
    validate_every: int = Field(default=1, ge=0)
    checkpoint_every: int = Field(default=1, ge=1)
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """For the chat template that renders conversations of ``data`` (``{"enable_thinking": false}``, say)."""

    @field_validator("data", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return () if given is None else (given,) if isinstance(given, str | Path) else given

    @field_validator("batch")
    @classmethod
    def _no_groups(cls, batch: BatchSettings) -> BatchSettings:
        if batch.groups != GroupPolicy() or batch.credit != "final":
            raise ValueError("groups and credit by step have no part in SFT: keep says which rollouts are trained on")
        return batch

    @model_validator(mode="after")
    def _plays_or_reads(self) -> SFT:
        if self.template_arguments and not self.data:
            raise ValueError("template_arguments are for conversations of data: give data, or leave them out")
        return self

    def settle(self, episodes: Sequence[Episode], group_of: Mapping[str, str], oldest_version: int | None) -> Account:
        """Those that are kept, as ``keep`` has it."""
        from lightning_ray.trajectories.keeping import keep_best

        return keep_best(episodes, group_of, self.keep, self.batch, oldest_version)

    def source(self, run: Run, clock: PhaseClock) -> Source:
        """The run's own policy on its training tasks, or what ``data`` holds."""
        if self.data:
            from lightning_ray.algorithms.imitated import ImitatedRollouts

            return ImitatedRollouts(self, run)
        from lightning_ray.algorithms.playing import PlayedRollouts

        return PlayedRollouts(self, run, clock, self.prompts_per_step or len(run.train_dataset))

    def update_settings(self, model: Path) -> UpdateSettings:
        """What the trainer ranks need of these settings. What others sampled has no logprobs that could be checked."""
        changes = {"objective": "likelihood", "check_logprobs": not self.data}
        return super().update_settings(model).model_copy(update=changes)

    def check(self, run: Run) -> None:
        """Tasks or data, the model, the engine's port and the memory must be there."""
        if self.data:
            from lightning_ray.algorithms.imitated import check_data

            check_data(self)
        else:
            check_tasks(run)
        super().check(run)
