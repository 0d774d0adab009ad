"""The search's state in the run's folder, after every round: ``checkpoints/step-NNNNNN/run_state.json``."""

from __future__ import annotations

from lightning_ray.algorithms.apo.state import SearchState
from lightning_ray.run.folder import RunFolder


def save(folder: RunFolder, state: SearchState) -> None:
    """Keep it, whole or not at all, beside the two before it."""
    state.saves += 1  # a number of its own, so that what was kept last is never in the way
    writing = folder.begin_checkpoint(state.saves)
    writing.mkdir()
    folder.commit_checkpoint(writing, state.saves, state.model_dump(mode="json"))


def load(folder: RunFolder) -> SearchState:
    """What was kept last."""
    return SearchState.model_validate(folder.read_state())
