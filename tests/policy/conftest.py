"""What tests of the update have in common: two ranks, a tiny model, and rollouts of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest

if TYPE_CHECKING:
    from tests.policy.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    from tests.policy.ranks import shared_ranks

    return shared_ranks()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's."""
    from tests.policy.oracle import write_tiny_model

    folder = tmp_path_factory.mktemp("policy") / "model"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def batches(folder: Path) -> list[pa.Table]:
    """Four, each of other rollouts."""
    from tests.policy.oracle import load, make_batch

    model = load(folder)
    return [make_batch(model, seed=seed) for seed in range(4)]


@pytest.fixture(scope="session")
def table(batches: list[pa.Table]) -> pa.Table:
    return batches[0]
