"""Estimates of how far the policy is from the reference, token by token, by verl's ``core_algos``."""

from __future__ import annotations

import torch
from verl.trainer.ppo.core_algos import kl_penalty

from lightning_ray.policy.parts import Divergence


def divergence(logprobs: torch.Tensor, reference: torch.Tensor, estimator: Divergence) -> torch.Tensor:
    """In nats, of the shape of both: KL(policy, reference) on average over tokens that the policy sampled."""
    estimate: torch.Tensor = kl_penalty(logprobs, reference, estimator)
    return estimate
