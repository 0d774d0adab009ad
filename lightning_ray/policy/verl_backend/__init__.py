"""The only package that imports verl.

verl reads its platform from the environment once, at its first import: ``choose_platform`` must come before
any module of this package is imported. Only this much of verl is used: its FSDP2 engine (model, LoRA, optimizer,
checkpoints), the advantage estimators, losses and divergences of ``core_algos``, and ``rollout_corr_helper``.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from lightning_ray.errors import ConfigError

VERL_VERSION = "0.9.1"


def choose_platform(device: str) -> None:
    """Tell verl, before it is imported, what device to run on: ``cpu`` or ``cuda``.

    Raises ConfigError if verl is missing or of another version.
    """
    try:
        found = version("verl")
    except PackageNotFoundError:
        found = "none"
    if found != VERL_VERSION:
        raise ConfigError(f"verl {VERL_VERSION} is needed, found {found}: pip install verl=={VERL_VERSION}")
    os.environ["VERL_PLATFORM"] = {"cpu": "cpu", "cuda": "nvidia"}[device]
    os.environ["VERL_USE_EXTERNAL_MODULES"] = f"{__name__}.cpu"
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
