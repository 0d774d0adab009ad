"""What vouches for a model that is served as its folder has it, without a trainer beside it.

A checkpoint carries the canaries' logprobs that its trainer computed when it was saved: a replica that loaded the
folder answers only if it reproduces them, as after a swap. A folder from elsewhere tells nothing to compare with; its
weights are whatever the engine loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ray.policy.model_folder import STATE

CANARIES = "canaries.json"


@dataclass(frozen=True)
class Loaded:
    """The weights of a folder: their version, and what is to be reproduced; nothing if ``canaries`` is empty."""

    version: int
    tolerance: float
    canaries: tuple[tuple[int, ...], ...] = ()
    expected: tuple[tuple[float, ...], ...] = ()

    def proof(self, difference: float | None) -> dict[str, Any]:
        """What an evaluation tells of it."""
        if difference is None:
            return {"by": "the engine's loading of the folder"}
        return {"by": "the checkpoint's canaries", "max_logprob_diff": difference, "tolerance": self.tolerance}

    def refusal(self, folder: Path, replica_id: str, difference: float) -> str:
        """What a user is told when a replica computes otherwise than the trainer did."""
        return (
            f"replica {replica_id} loaded {folder}, and its canary logprobs differ by {difference:.2e} (tolerance "
            f"{self.tolerance:.0e}) from what the trainer computed when it saved the checkpoint: it does not serve "
            "these weights. Were its files changed? Raise engine.logprob_tolerance if the engine's numbers are "
            "coarser than the trainer's"
        )


def loaded_from(folder: Path, version: int, tolerance: float) -> Loaded:
    """What vouches for the folder."""
    file = folder / STATE / CANARIES
    if not file.is_file():
        return Loaded(version, tolerance)
    told = json.loads(file.read_text())
    rows = (tuple(tuple(row) for row in told[name]) for name in ("prompts", "logprobs"))
    return Loaded(version, tolerance, *rows)


def write_canaries(folder: Path, prompts: list[list[int]], logprobs: list[list[float]]) -> None:
    """Keep with a checkpoint what its trainer computed: natural logarithms of tokens 1.. of each prompt."""
    (folder / STATE / CANARIES).write_text(json.dumps({"prompts": prompts, "logprobs": logprobs}))
