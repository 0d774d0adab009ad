"""What each trained token of a batch needs before the first step: old log probabilities, the reference's, advantages.

Every rank computes it all from the whole batch, forward passes apart, which the ranks share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lightning_ray.policy.batch import Batch
from lightning_ray.policy.credit import step_advantages
from lightning_ray.policy.scoring import Scorer
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.policy.trained_tokens import TrainedTokens, trained_tokens
from lightning_ray.policy.verl_backend.advantages import outcome_advantages
from lightning_ray.policy.verl_backend.divergence import divergence


@dataclass(frozen=True)
class Prepared:
    """A batch ready to be trained on."""

    rollouts: np.ndarray
    """Indices of those that are trained, ascending."""
    columns: dict[str, np.ndarray]
    """Of each token of the batch: ``logprobs`` (the engine's), ``fresh`` (whether the weights about to be trained
    sampled it), of a policy objective ``old_logprobs``, ``advantages`` and, where asked for, ``reference``."""
    figures: dict[str, float]


def prepare(settings: UpdateSettings, batch: Batch, scorer: Scorer, version: int | None = None) -> Prepared:
    """Score the batch and credit its tokens; collective. Raises ValueError if no rollout can be trained."""
    rollouts = trainable(batch)
    rows = np.flatnonzero(np.isin(batch.row_rollout, rollouts))
    columns = {"logprobs": batch.logprobs, "fresh": batch.sampled_by(version)}
    if settings.objective == "likelihood":
        return Prepared(rollouts, columns, {})
    tokens = trained_tokens(batch, rollouts)
    columns["old_logprobs"] = batch.logprobs
    figures: dict[str, float] = {}
    if settings.old_logprobs == "trainer" or _penalised(settings):
        policy = scorer.policy(batch, rows)
        if settings.old_logprobs == "trainer":
            columns["old_logprobs"] = policy
        figures |= _gap(policy, batch, tokens, version)
    penalty = None
    if settings.reference.coefficient:
        columns["reference"] = scorer.reference(batch, rows)
    if _penalised(settings):
        new, old = (torch.from_numpy(tokens.matrix(scores[tokens.flat])) for scores in (policy, columns["reference"]))
        apart = divergence(new, old, settings.reference.estimator).numpy()
        penalty = settings.reference.coefficient * apart
        figures["reference_kl"] = float((apart * tokens.mask).sum() / len(tokens.flat))
    columns["advantages"] = settings.reward_weight * _advantages(settings, batch, rollouts, tokens, penalty)
    if settings.teacher_weight:
        lead = teacher_lead(batch, columns["old_logprobs"])
        columns["advantages"] += settings.teacher_weight * lead
        figures["teacher_kl"] = -float(lead[tokens.flat].mean(dtype=np.float64))
    return Prepared(rollouts, columns, figures)


def trainable(batch: Batch) -> np.ndarray:
    """Indices of the rollouts with a trained token. Raises ValueError if there are none."""
    rollouts = np.flatnonzero(batch.trained_per_rollout())
    if not len(rollouts):
        raise ValueError("no rollout of the batch can be trained: none has a token with mask 1")
    return rollouts


def _penalised(settings: UpdateSettings) -> bool:
    return settings.reference.coefficient > 0 and settings.reference.place == "reward"


def _advantages(
    settings: UpdateSettings, batch: Batch, rollouts: np.ndarray, tokens: TrainedTokens, penalty: np.ndarray | None
) -> np.ndarray:
    """Of each token of the batch, float32."""
    if not settings.reward_weight:
        return np.zeros(len(batch.token_ids), np.float32)
    group = batch.group[rollouts]
    if batch.advantage is not None:
        given = settings.model_copy(update={"advantage": "reward"})
        matrix = outcome_advantages(given, batch.advantage[rollouts], group, tokens.mask, penalty)
    elif settings.credit == "step":
        matrix = step_advantages(batch, tokens, group, settings.advantage_by_std)
    else:
        matrix = outcome_advantages(settings, batch.reward[rollouts], group, tokens.mask, penalty)
    return tokens.scatter(matrix, len(batch.token_ids))


def teacher_lead(batch: Batch, student: np.ndarray) -> np.ndarray:
    """By how much the teacher holds each token for likelier than the student, in nats; 0 where none is trained.

    The mean of its negative over tokens that the student sampled estimates the reverse divergence, KL(student |
    teacher) (Agarwal et al., 2024, "On-Policy Distillation of Language Models", arXiv:2306.13649). Raises ValueError
    without the teacher's column.
    """
    if batch.teacher_logprobs is None:
        raise ValueError("teacher_weight needs the column 'teacher_logprobs', which the batch lacks")
    return np.where(batch.mask > 0, batch.teacher_logprobs - student, 0).astype(np.float32)


def _gap(policy: np.ndarray, batch: Batch, tokens: TrainedTokens, version: int | None) -> dict[str, float]:
    """The largest and the mean difference between trainer and engine, in nats, of tokens that ``version`` sampled."""
    gap = np.abs(policy - batch.logprobs)[tokens.flat][batch.sampled_by(version)[tokens.flat]]
    if not len(gap):
        return {"max_logprob_diff": 0.0, "mean_logprob_diff": 0.0}
    return {"max_logprob_diff": float(gap.max()), "mean_logprob_diff": float(gap.mean(dtype=np.float64))}
