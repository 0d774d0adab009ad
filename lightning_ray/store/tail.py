"""Where the spans lie that are in the log and in no segment yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import pyarrow as pa

from lightning_ray.store.log import BodyReader, BodyRef
from lightning_ray.store.numbering import Run, numbered
from lightning_ray.store.schema import decode_batch


class LogFile:
    """Where the spans of rollouts lie in a file of the log."""

    def __init__(self) -> None:
        self.rows = 0
        self._places: defaultdict[str, list[tuple[BodyRef, Run]]] = defaultdict(list)

    @property
    def rollouts(self) -> Iterable[str]:
        """The rollouts, by first appearance."""
        return self._places

    def add(self, ref: BodyRef, runs: Sequence[Run]) -> None:
        """Note a record's runs."""
        for run in runs:
            self._places[run[0]].append((ref, run))
            self.rows += run[3]

    def drop(self, rollout_id: str) -> None:
        """Forget a rollout."""
        for _, run in self._places.pop(rollout_id, ()):
            self.rows -= run[3]

    def places(self, rollout_id: str) -> Sequence[tuple[BodyRef, Run]]:
        """A rollout's bodies and runs, in order of arrival."""
        return self._places.get(rollout_id, ())

    def batches(self, bodies: BodyReader) -> Iterator[pa.RecordBatch]:
        """All rows that were not dropped, in order of arrival; whole batches where that is the same."""
        places = sorted((place for of_one in self._places.values() for place in of_one), key=_in_file)
        for ref, group in groupby(places, key=lambda place: place[0]):
            batch, runs = decode_batch(bodies.read(ref)), [run for _, run in group]
            if sum(run[3] for run in runs) == batch.num_rows and not any(run[4] for run in runs):
                yield batch
            else:
                yield from (numbered(batch, run) for run in runs)


def _in_file(place: tuple[BodyRef, Run]) -> tuple[int, int]:
    return place[0].offset, place[1][2]
