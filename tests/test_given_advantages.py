"""Advantages that an algorithm gave, from its call of ``train`` to the tokens that they weigh."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from lightning_ray.policy.batch import read_batch
from lightning_ray.policy.settings import UpdateSettings
from lightning_ray.trajectories.account import BATCH_SCHEMA
from lightning_ray.trajectories.given import with_advantages


def table(*rows: tuple[str, str, list[int]]) -> pa.Table:
    """Rows of (rollout, group, mask), with rewards that have no part in it."""
    columns = {
        "rollout_id": [rollout_id for rollout_id, _, _ in rows],
        "group_id": [group for _, group, _ in rows],
        "token_ids": [list(range(len(mask))) for _, _, mask in rows],
        "mask": [mask for _, _, mask in rows],
        "logprobs": [[-1.0] * len(mask) for _, _, mask in rows],
        "weight_versions": [[0] * len(mask) for _, _, mask in rows],
        "reward": [7.0] * len(rows),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in BATCH_SCHEMA], schema=BATCH_SCHEMA)


def test_each_trained_token_gets_its_rollouts_advantage_whatever_its_group_and_reward() -> None:
    from lightning_ray.policy.prepare import _advantages, trainable
    from lightning_ray.policy.trained_tokens import trained_tokens

    rows = table(("a", "g", [0, 1, 0, 1]), ("a", "g", [0, 1]), ("b", "g", [0, 1, 1]), ("c", "alone", [0, 1]))
    batch = read_batch(with_advantages(rows, {"a": 0.5, "b": -2.0, "c": 3.0}))
    rollouts = trainable(batch)
    settings = UpdateSettings(model_path="m", advantage="grpo")
    found = _advantages(settings, batch, rollouts, trained_tokens(batch, rollouts), None)
    assert found.tolist() == [0, 0.5, 0, 0.5, 0, 0.5, 0, -2.0, -2.0, 0, 3.0]
    by_rewards = _advantages(settings, read_batch(rows), rollouts, trained_tokens(batch, rollouts), None)
    assert not np.any(by_rewards), "all rewards are the same"


def test_rows_of_a_rollout_have_one_advantage() -> None:
    rows = table(("a", "g", [0, 1]), ("a", "g", [0, 1])).append_column("advantage", pa.array([1.0, 2.0], pa.float32()))
    with pytest.raises(ValueError, match="rows of one rollout carry different advantages"):
        read_batch(rows)
