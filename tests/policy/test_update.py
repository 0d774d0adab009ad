"""The policy update against an independent one, over ranks, micro batches, checkpoints and odd batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("verl")

from lightning_ray.errors import ConfigError
from lightning_ray.policy.settings import AdvantageName, DivergedError, LossName
from tests.policy.oracle import (
    PlainTrainer,
    batch_table,
    load,
    token_logprobs,
)
from tests.policy.ranks import Ranks, assert_same_weights, settings_for, with_column


def on_policy(ranks: Ranks, table: pa.Table) -> pa.Table:
    """The same rows with the trainer's own logprobs, as an engine with equal weights would give them."""
    logprobs = ranks.call("logprobs", table["token_ids"].to_pylist())
    masks = table["mask"].to_pylist()
    rows = [(np.concatenate([[0.0], row]) * mask).tolist() for row, mask in zip(logprobs, masks, strict=True)]
    return with_column(table, "logprobs", rows)


@pytest.fixture(scope="module")
def plain(folder: Path, batches: list[pa.Table]) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """What the independent update makes of the batches: results and final weights."""
    trainer = PlainTrainer(folder, settings_for(folder))
    results = [trainer.update(table) for table in batches]
    return results, {name: weight.detach().numpy() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize(("world_size", "micro_batch_tokens"), [(1, 8192), (1, 64), (2, 8192), (2, 64)])
def test_equals_plain_pytorch(
    ranks: Ranks,
    folder: Path,
    batches: list[pa.Table],
    plain: tuple[list[dict[str, float]], dict[str, np.ndarray]],
    world_size: int,
    micro_batch_tokens: int,
) -> None:
    settings = settings_for(folder, minibatch_rollouts=1000, micro_batch_tokens=micro_batch_tokens)
    before = ranks.build(settings, world_size).weights()
    results, weights = plain
    for table, expected in zip(batches, results, strict=True):
        result = ranks.call("update", table)
        assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert 0 < result["clip_share"] < 1
    assert_same_weights(ranks.weights(), weights, atol=1e-5)
    assert all(np.abs(weights[name] - before[name]).max() > 1e-3 for name in weights)


def test_two_ranks_step_through_minibatches_as_one_does(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    settings = settings_for(folder, minibatch_rollouts=5, epochs=2, micro_batch_tokens=100)
    results, weights = [], []
    for world_size in (1, 2):
        ranks.build(settings, world_size)
        results.append([ranks.call("update", table) for table in batches[:2]])
        weights.append(ranks.weights())
    for one, two in zip(*results, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
        assert one["steps"] == 8
    assert_same_weights(*weights, atol=1e-5)


def test_more_ranks_than_rows(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    rows = batches[0].to_pylist()
    first = {row["rollout_id"]: row for row in reversed(rows) if row["rollout_id"] in ("r0", "r1")}
    table = batch_table({name: [row[name] for row in first.values()] for name in batches[0].column_names})
    settings = settings_for(folder, minibatch_rollouts=1, warmup_steps=0)
    one = ranks.build(settings, 1).call("update", table)
    assert ranks.build(settings, 2).call("update", table) == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_statistics_are_of_rollouts_not_of_rows(ranks: Ranks, folder: Path) -> None:
    ranks.build(settings_for(folder), 1)
    sequence, mask = [5, 6, 7, 8], [0, 1, 1, 1]
    rollouts = ["a", "a", "a", "b", "c"]
    rewards = {"a": 1.0, "b": 0.0, "c": 0.0}
    table = batch_table(
        {
            "rollout_id": rollouts,
            "group_id": ["g"] * 5,
            "reward": [rewards[rollout] for rollout in rollouts],
            "token_ids": [sequence] * 5,
            "mask": [mask] * 5,
            "logprobs": [[0.0] * 4] * 5,
            "weight_versions": [[0] * 4] * 5,
        }
    )
    result = ranks.call("update", on_policy(ranks, table))
    mean, deviation = 1 / 3, np.std([1, 0, 0], ddof=1)
    advantages = [(rewards[rollout] - mean) / deviation for rollout in rollouts]
    # With ratios of 1 the loss is minus the mean advantage of the trained tokens.
    assert result["loss"] == pytest.approx(-np.mean(advantages), abs=1e-4)
    assert result["max_logprob_diff"] < 1e-5


def test_only_sampled_tokens_are_trained(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    table = batches[0]
    masks = table["mask"].to_pylist()
    noise = np.random.default_rng(0)
    rows = [
        np.where(mask, row, noise.uniform(-9, 0, len(row))).tolist()
        for mask, row in zip(masks, table["logprobs"].to_pylist(), strict=True)
    ]
    settings = settings_for(folder, warmup_steps=0)
    weights, results = [], []
    for each in (table, with_column(table, "logprobs", rows)):
        ranks.build(settings, 1)
        results.append(ranks.call("update", each))
        weights.append(ranks.weights())
    assert results[0] == results[1]
    assert_same_weights(*weights, atol=0)
    assert results[0]["trained_tokens"] == sum(sum(mask) for mask in masks)


def test_logprobs_are_checked_before_the_first_step(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    ranks.build(settings_for(folder, minibatch_rollouts=1, warmup_steps=0, learning_rate=1e-2), 2)
    table = on_policy(ranks, batches[0])
    rows = table["logprobs"].to_pylist()
    rows[-1][-1] -= 0.125
    result = ranks.call("update", with_column(table, "logprobs", rows))
    # All but one of sixteen steps came before the last rollout was trained; none is seen here.
    assert result["max_logprob_diff"] == pytest.approx(0.125, abs=1e-4)
    assert result["mean_logprob_diff"] == pytest.approx(0.125 / result["trained_tokens"], abs=1e-5)


COMPARING = ("grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline")


@pytest.mark.parametrize("advantage", get_args(AdvantageName))
def test_a_rollout_alone_in_its_group_has_no_baseline(
    ranks: Ranks, folder: Path, batches: list[pa.Table], advantage: str
) -> None:
    """Where rollouts are compared its advantage is 0, and in no statistic; its tokens count all the same."""
    table = batches[0]
    other = {"rollout_id": "z", "group_id": "z", "reward": 2.0}
    lone = [row | other for row in table.to_pylist() if row["rollout_id"] == "r0"]
    added = pa.concat_tables([table, pa.Table.from_pylist(lone, table.schema)])
    settings = settings_for(folder, warmup_steps=0, advantage=advantage, minibatch_rollouts=1000)
    without = ranks.build(settings, 1).call("update", table)
    result = ranks.build(settings, 1).call("update", added)
    assert (without["lone_rollouts"], result["lone_rollouts"]) == (0, 1)
    assert result["trained_rollouts"] == without["trained_rollouts"] + 1
    whole = result["loss"] * result["trained_tokens"]
    unchanged = whole == pytest.approx(without["loss"] * without["trained_tokens"], rel=1e-4)
    assert unchanged == (advantage in COMPARING)


def test_a_batch_of_lone_rollouts_alone_moves_nothing(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    table = batches[0]
    alone = table.set_column(table.column_names.index("group_id"), "group_id", table["rollout_id"])
    before = ranks.build(settings_for(folder, warmup_steps=0, weight_decay=0.0), 1).weights()
    result = ranks.call("update", alone)
    assert result["loss"] == result["grad_norm"] == 0
    assert result["lone_rollouts"] == result["trained_rollouts"] > 1
    assert_same_weights(ranks.weights(), before, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(
    ranks: Ranks, folder: Path, batches: list[pa.Table], tmp_path: Path, world_size: int
) -> None:
    settings = settings_for(folder, minibatch_rollouts=5)
    saved = tmp_path / "saved"
    ranks.build(settings, world_size)
    ranks.call("update", batches[0])
    ranks.call("save", str(saved))
    saved_weights = ranks.weights()
    expected = [ranks.call("update", table) for table in batches[1:]]
    expected_weights = ranks.weights()

    ranks.build(settings, world_size)
    ranks.call("logprobs", [[1, 2, 3]])
    ranks.call("load", str(saved))
    assert_same_weights(ranks.weights(), saved_weights, atol=0)
    assert [ranks.call("update", table) for table in batches[1:]] == expected
    assert_same_weights(ranks.weights(), expected_weights, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resume_follows_the_settings_it_is_given(
    ranks: Ranks, folder: Path, batches: list[pa.Table], tmp_path: Path, world_size: int
) -> None:
    """Moments and the schedule's place are the checkpoint's; rate, betas, decay and the schedule's shape are given."""
    settings = settings_for(folder, minibatch_rollouts=1000, weight_decay=0.0, warmup_steps=1)
    ranks.build(settings, world_size)
    for table in batches[:2]:
        ranks.call("update", table)
    ranks.call("save", str(tmp_path / "saved"))
    saved = ranks.weights()

    def resumed(**changes: Any) -> tuple[float, np.ndarray]:
        ranks.build(settings.model_copy(update=changes), world_size)
        ranks.call("load", str(tmp_path / "saved"))
        result = ranks.call("update", batches[2])
        moved = ranks.weights()
        return result["learning_rate"], np.concatenate([(moved[name] - saved[name]).ravel() for name in saved])

    rate, step = resumed()
    assert rate == settings.learning_rate
    tripled, larger = resumed(learning_rate=3 * rate)
    assert tripled == 3 * rate
    np.testing.assert_allclose(larger, 3 * step, atol=1e-6)
    assert resumed(schedule="linear", schedule_steps=5)[0] == pytest.approx(rate * 3 / 4)
    assert resumed(warmup_steps=8)[0] == pytest.approx(rate * 2 / 8)
    assert np.abs(resumed(betas=(0.5, 0.99))[1] - step).max() > 1e-5
    assert np.abs(resumed(weight_decay=0.5)[1] - step).max() > 1e-5


def test_a_saved_folder_is_a_model(ranks: Ranks, folder: Path, batches: list[pa.Table], tmp_path: Path) -> None:
    ranks.build(settings_for(folder, warmup_steps=0), 2)
    ranks.call("update", batches[0])
    ranks.call("save", str(tmp_path))
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    assert_same_weights(weights, ranks.weights(), atol=0)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    ranks.build(settings_for(tmp_path), 1)
    assert_same_weights(ranks.weights(), weights, atol=0)
    with pytest.raises(ConfigError, match="saved by 2 trainer ranks and cannot be resumed by 1"):
        ranks.call("load", str(tmp_path))
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        ranks.call("load", str(folder))


@pytest.mark.parametrize("world_size", [1, 2])
def test_logprobs_equal_those_of_transformers(
    ranks: Ranks, folder: Path, batches: list[pa.Table], world_size: int
) -> None:
    ranks.build(settings_for(folder), world_size)
    sequences = [*batches[0]["token_ids"].to_pylist()[:5], [3, 4]]
    model = load(folder)
    for ours, sequence in zip(ranks.call("logprobs", sequences), sequences, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, token_logprobs(model, sequence).detach().numpy(), atol=1e-5)


def test_every_advantage_and_loss_is_the_same_on_two_ranks(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    rows = {"loss_aggregation": "seq-mean-token-mean"}
    horizon = {"loss_aggregation": "seq-mean-token-sum-norm", "loss_horizon": 64, "advantage_by_std": False}
    choices: list[dict[str, Any]] = [{"advantage": name} for name in get_args(AdvantageName)]
    choices += [{"loss": name, **rows} for name in get_args(LossName)] + [horizon]
    results = []
    for world_size in (1, 2):
        results.append([])
        for choice in choices:
            settings = settings_for(folder, micro_batch_tokens=100 * world_size, warmup_steps=0, **choice)
            results[-1].append(ranks.build(settings, world_size).call("update", batches[0]))
    for choice, one, two in zip(choices, *results, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6), choice
        assert one["grad_norm"] > 0


def test_a_loss_that_is_not_finite_changes_nothing(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    ranks.build(settings_for(folder, warmup_steps=0, minibatch_rollouts=1000), 2)
    rows = batches[0]["logprobs"].to_pylist()
    rows[0][-1] = float("nan")
    before = ranks.weights()
    with pytest.raises(DivergedError, match="loss of update 1 is nan"):
        ranks.call("update", with_column(batches[0], "logprobs", rows))
    assert_same_weights(ranks.weights(), before, atol=0)


def test_a_malformed_batch_is_named(ranks: Ranks, folder: Path, batches: list[pa.Table]) -> None:
    ranks.build(settings_for(folder), 1)
    table = batches[0]
    first_trained = table["mask"].to_pylist()
    first_trained[2][0] = 1
    short = table["logprobs"].to_pylist()
    short[1] = short[1][:-1]
    two_rewards = list(range(table.num_rows))
    for broken, message in [
        (table.slice(0, 0), "no rows"),
        (table.drop_columns("mask"), r"lacks the columns \['mask'\]"),
        (with_column(table, "mask", first_trained), "row 2 trains its first token"),
        (with_column(table, "logprobs", short), "'logprobs' must have as many items"),
        (with_column(table, "reward", two_rewards), "different rewards"),
        (with_column(table, "mask", [[0] * len(row) for row in first_trained]), "no rollout of the batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            ranks.call("update", broken)


def test_an_unusable_model_path_is_named(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_path='/no/such/model' is not a folder"):
        ranks.build(settings_for(Path("/no/such/model")), 1)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ranks.build(settings_for(tmp_path), 1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ConfigError, match=r"but no weights \(\*\.safetensors or \*\.bin\)"):
        ranks.build(settings_for(tmp_path), 1)
