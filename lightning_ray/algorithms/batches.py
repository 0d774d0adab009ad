"""Batches of a data set without end, for algorithms of one's own. Name and meaning as in Agent Lightning 0.3."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from lightning_ray.types import Dataset

T = TypeVar("T")


def batch_iter_over_dataset(
    dataset: Dataset[T], batch_size: int, rng: random.Random | None = None
) -> Iterator[Sequence[T]]:
    """Batches of ``batch_size`` tasks for ever, every pass over the data set in a fresh random order (of ``rng``).

    No batch has a task twice: one that a pass leaves short is filled by the next with other tasks. A data set that is
    no larger than a batch is a batch.
    """
    size = min(batch_size, len(dataset))
    if size < 1:
        raise ValueError(f"batches of {batch_size} out of {len(dataset)} tasks: both must be at least 1")
    batch: list[int] = []
    sample = random.sample if rng is None else rng.sample
    while True:
        order = sample(range(len(dataset)), len(dataset))
        begun = frozenset(batch)
        for index in sorted(order, key=begun.__contains__):
            batch.append(index)
            if len(batch) == size:
                yield [dataset[chosen] for chosen in batch]
                batch = []
