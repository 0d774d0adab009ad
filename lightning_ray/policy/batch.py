"""The training batch as flat arrays, read from Arrow without copying.

Invariant: one reward a rollout. A rollout may have several rows (trajectories); they share its reward, and
whatever is counted per rollout is counted once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

LISTS = ("token_ids", "mask", "logprobs")
OPTIONAL_LISTS = ("weight_versions", "step_rewards", "teacher_logprobs")
COLUMNS = (*LISTS, "rollout_id", "group_id", "reward")


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end: row ``i`` is ``offsets[i]:offsets[i + 1]`` of the token arrays."""

    token_ids: np.ndarray
    mask: np.ndarray
    """1 where the token was sampled by the policy and is trained."""
    logprobs: np.ndarray
    """The engine's, where the mask is 1."""
    offsets: np.ndarray
    row_rollout: np.ndarray
    """Of each row, the index of its rollout."""
    group: np.ndarray
    """Of each rollout, the index of its group."""
    reward: np.ndarray
    """Of each rollout."""
    weight_versions: np.ndarray | None = None
    """Of each token: the version of the weights that sampled it."""
    step_rewards: np.ndarray | None = None
    """Of each token: its call's reward where it is the last that the call sampled, else 0 or NaN."""
    teacher_logprobs: np.ndarray | None = None
    """Of each token, where the mask is 1: its log probability under the teacher."""
    advantage: np.ndarray | None = None
    """Of each rollout, where an algorithm gave it rather than leave it to the rewards."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def sampled_by(self, version: int | None) -> np.ndarray:
        """Of each token, whether the weights of ``version`` sampled it; all, where that is not known."""
        if version is None or self.weight_versions is None:
            return np.ones(len(self.token_ids), bool)
        return self.weight_versions == version

    def trained_per_row(self) -> np.ndarray:
        """Tokens with mask 1 of each row."""
        return np.add.reduceat(self.mask, self.offsets[:-1], dtype=np.int64)

    def trained_per_rollout(self) -> np.ndarray:
        """Tokens with mask 1 of each rollout."""
        return np.bincount(self.row_rollout, self.trained_per_row(), len(self.reward)).astype(np.int64)


def read_batch(table: pa.Table) -> Batch:
    """Arrays of a table with one row a trajectory.

    Raises ValueError, naming the column or row, where the table breaks its contract.
    """
    if table.num_rows == 0:
        raise ValueError("the batch has no rows; an update needs at least one rollout")
    missing = {*COLUMNS} - {*table.column_names}
    if missing:
        raise ValueError(f"the batch lacks the columns {sorted(missing)}; it has {table.column_names}")
    lists = [*LISTS, *(name for name in OPTIONAL_LISTS if name in table.column_names)]
    columns = {name: table[name].combine_chunks() for name in (*COLUMNS, *lists)}
    offsets = _offsets(columns["token_ids"])
    for name in lists[1:]:
        if not np.array_equal(_offsets(columns[name]), offsets):
            raise ValueError(f"column {name!r} must have as many items in each row as 'token_ids'")
    if np.diff(offsets).min() < 2:
        raise ValueError(f"row {int(np.diff(offsets).argmin())} has fewer than two tokens")
    mask = columns["mask"].flatten().to_numpy()
    if mask[offsets[:-1]].any():
        row = int(mask[offsets[:-1]].argmax())
        raise ValueError(f"row {row} trains its first token, which no token precedes")
    rollout_of_row = columns["rollout_id"].dictionary_encode().indices.to_numpy()
    _, first_row = np.unique(rollout_of_row, return_index=True)
    group_of_row = columns["group_id"].dictionary_encode().indices.to_numpy()
    of_rollouts = {
        name: _of_rollouts(table, name, first_row, rollout_of_row)
        for name in ("reward", "advantage")
        if name in table.column_names
    }
    return Batch(
        token_ids=columns["token_ids"].flatten().to_numpy(),
        mask=mask,
        logprobs=columns["logprobs"].flatten().to_numpy(),
        offsets=offsets,
        row_rollout=rollout_of_row,
        group=group_of_row[first_row],
        **of_rollouts,
        **{name: _flat(columns[name]) for name in OPTIONAL_LISTS if name in columns},
    )


def _of_rollouts(table: pa.Table, name: str, first_row: np.ndarray, rollout_of_row: np.ndarray) -> np.ndarray:
    """A column with one number a rollout."""
    of_row = table[name].combine_chunks().to_numpy()
    if (of_row != of_row[first_row][rollout_of_row]).any():
        raise ValueError(f"rows of one rollout carry different {name}s")
    found: np.ndarray = of_row[first_row]
    return found


def _flat(column: pa.ListArray) -> np.ndarray:
    """The items of all rows; null is NaN."""
    return column.flatten().to_numpy(zero_copy_only=False)


def _offsets(column: pa.ListArray) -> np.ndarray:
    """Where each row begins in the flattened column, and the end of the last."""
    return np.concatenate([[0], np.cumsum(column.value_lengths().to_numpy())]).astype(np.int64)
