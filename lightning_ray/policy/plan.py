"""Who computes what: rollouts to minibatches, rows to ranks, rows to micro batches.

Every rank computes the whole plan from the whole batch and takes its part, so ranks agree without talking.
Invariant: in a minibatch every rank has the same number of micro batches (an empty one is a row of padding),
because each forward and backward pass is a collective call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_rollouts(rollouts: np.ndarray, at_most: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Shuffle rollouts into as few minibatches of at most ``at_most`` as will do, as equal as can be."""
    return np.array_split(generator.permutation(rollouts), -(-len(rollouts) // at_most))


def assign_rows(rows: np.ndarray, lengths: np.ndarray, ranks: int, max_tokens: int) -> list[list[np.ndarray]]:
    """The micro batches of each rank, ranks balanced by tokens.

    ``rows`` index into ``lengths``. Rows of like length go together, so that little is padding; a micro batch
    holds at most ``max_tokens`` tokens, padding included, or one longer row.
    """
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    per_rank: list[list[int]] = [[] for _ in range(ranks)]
    tokens = np.zeros(ranks, dtype=np.int64)
    for row in longest_first:
        rank = int(tokens.argmin())
        per_rank[rank].append(int(row))
        tokens[rank] += lengths[row]
    micro = [_cut(part, lengths, max_tokens) for part in per_rank]
    most = max(len(part) for part in micro)
    empty = np.zeros(0, dtype=np.int64)
    return [part + [empty] * (most - len(part)) for part in micro]


def alike(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places of equal length together, at most ``max_tokens`` tokens (or one place) a list."""
    by_length: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        by_length.setdefault(length, []).append(place)
    found = []
    for length, places in by_length.items():
        most = max(1, max_tokens // max(1, length))
        found += [places[begin : begin + most] for begin in range(0, len(places), most)]
    return found


def _cut(longest_first: list[int], lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Consecutive runs of rows whose padded size fits."""
    runs: list[list[int]] = []
    for row in longest_first:
        if runs and (len(runs[-1]) + 1) * lengths[runs[-1][0]] <= max_tokens:
            runs[-1].append(row)
        else:
            runs.append([row])
    return [np.array(run, dtype=np.int64) for run in runs]
