"""Loading without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lightning_ray.loading import uncollected


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_within_and_what_is_there_afterwards_is_passed_over() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError, match="it failed"), uncollected():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
        raise RuntimeError("it failed")
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with uncollected(), uncollected():
        pass
    assert not gc.isenabled()
