"""Weights & Biases, set up by its own variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, ...).

Without a key it works offline: the figures are kept in the run's folder, for ``wandb sync``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_ray.trackers.base import Row, remembered, scalars, settings_of

PROJECT = "lightning-ray"
"""Where WANDB_PROJECT does not say otherwise."""


class WandbTracker:
    """One run in W&B, which a resume continues."""

    def __init__(self, folder: Path):
        import wandb

        known = remembered(folder, "wandb")
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            id=known.read_text().strip() if known.is_file() else None,
            resume="allow" if mode == "online" else None,
            config=settings_of(folder),
            allow_val_change=True,  # a resume may be under other settings
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        known.write_text(self._run.id)
        # By the run's own step, not by W&B's, which never goes back: a restart makes steps again.
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        """Send the row's numbers."""
        self._run.log({**scalars(row), "step": row["step"]})

    def close(self) -> None:
        """Wait until all is sent or written, and end W&B's own process."""
        import wandb

        self._run.finish()
        if wandb.run is None:  # no run of the user's own is at work
            wandb.teardown()
