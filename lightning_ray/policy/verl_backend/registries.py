"""Whether verl knows every name that the settings admit."""

from __future__ import annotations

from typing import get_args

from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.trainer.ppo.rollout_corr_helper import SUPPORTED_ROLLOUT_RS_OPTIONS

from lightning_ray.errors import ConfigError
from lightning_ray.policy.parts import Rejection
from lightning_ray.policy.settings import AdvantageName, LossName
from lightning_ray.policy.verl_backend import VERL_VERSION
from lightning_ray.policy.verl_backend.correction import verl_name


def check_names() -> None:
    """Raise ConfigError if a name that the settings admit is not in verl's registries."""
    names = {*get_args(AdvantageName)} - {"reward"} - ADV_ESTIMATOR_REGISTRY.keys()
    names |= {*get_args(LossName)} - POLICY_LOSS_REGISTRY.keys()
    names |= {verl_name(name) for name in get_args(Rejection)} - SUPPORTED_ROLLOUT_RS_OPTIONS
    if names:
        raise ConfigError(f"verl does not know {sorted(names)}: install verl=={VERL_VERSION} unchanged")
