"""Beam search, as in Agent Lightning 0.3: beam and children meet on a batch of validation tasks, the best go on.

The leader is then validated in full. A candidate that has a reward for a task is not played on it again, so that a
leader which stays costs nothing, and luck is not drawn for twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from lightning_ray.algorithms.apo.candidates import Candidate
from lightning_ray.algorithms.apo.selection import Bench, Birth, Selection
from lightning_ray.algorithms.batches import batch_iter_over_dataset


class Beam(Selection):
    """See the module."""

    def __init__(self, bench: Bench):
        super().__init__(bench)
        rng = random.Random(f"{bench.settings.seed}/val")
        batches = batch_iter_over_dataset(range(len(bench.val)), bench.settings.val_batch_size, rng)
        self._batches: Iterator[Sequence[int]] = islice(batches, bench.state.val_batches, None)

    def parents(self, rng: random.Random) -> list[Candidate]:
        """The beam in random order; a beam that is not full goes round."""
        state, width = self.bench.state, self.bench.settings.beam_width
        beam = [state.candidates[version] for version in state.beam]
        if len(beam) < width:
            return [beam[place % len(beam)] for place in range(width)]
        return rng.sample(beam, width)

    async def judge(self, births: Sequence[Birth]) -> None:
        """One batch for all; the ``beam_width`` best are the next beam, the first of them is validated in full."""
        bench, state = self.bench, self.bench.state
        batch = next(self._batches)
        state.val_batches += 1
        contenders = [state.candidates[version] for version in state.beam]
        contenders += [birth.candidate for birth in births]
        await bench.validate(contenders, batch)
        ranked = bench.compare(contenders, batch)[: bench.settings.beam_width]
        state.beam = [candidate.version for candidate in ranked]
        await bench.validate(ranked[:1])
        bench.consider(ranked[0])
