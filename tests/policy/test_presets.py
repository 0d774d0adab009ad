"""Each preset against its paper's formula, written by hand: the loss, and the gradient of every weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch

pytest.importorskip("verl")

import lightning_ray as lr
from lightning_ray.algorithms.presets import PRESETS, PresetName
from lightning_ray.errors import ConfigError
from tests.policy import formulas as by_hand
from tests.policy.formulas import Row
from tests.policy.oracle import load
from tests.policy.ranks import Ranks

Formula = Callable[[pa.Table, list[Row]], torch.Tensor]


def compose(advantages: Any, loss: Any, total: Any) -> Formula:
    def formula(table: pa.Table, rows: list[Row]) -> torch.Tensor:
        pairs = zip(rows, advantages(table, rows), strict=True)
        return total(rows, [loss(row, advantage) for row, advantage in pairs])

    return formula


def group(by_std: bool) -> Any:
    return lambda table, rows: by_hand.spread(rows, by_hand.group_relative(table, by_std))


def with_divergence(table: pa.Table, rows: list[Row]) -> torch.Tensor:
    """GRPO's objective, divergence included."""
    policy = compose(group(True), by_hand.clipped(0.2, 0.2), by_hand.mean_over_rollouts)(table, rows)
    return policy + 0.04 * by_hand.mean_over_rollouts(rows, [by_hand.k3(row) for row in rows])


FORMULAS: dict[str, Formula] = {
    "grpo": with_divergence,
    "dr-grpo": compose(
        group(False), by_hand.clipped(0.2, 0.2), lambda rows, losses: by_hand.sum_over_rollouts(rows, losses, 1024)
    ),
    "dapo": compose(group(True), by_hand.clipped(0.2, 0.28), by_hand.mean_over_tokens),
    "gspo": compose(group(True), by_hand.sequence_clipped(3e-4, 4e-4), by_hand.mean_over_rollouts),
    "cispo": compose(group(True), by_hand.weight_clipped(1.0, 4.0), by_hand.mean_over_tokens),
    "rloo": compose(
        lambda table, rows: by_hand.spread(rows, by_hand.leave_one_out(table)),
        by_hand.log_probability,
        by_hand.sum_over_rollouts,
    ),
    "reinforce++": compose(
        lambda table, rows: by_hand.globally_normalised(table, rows, 0.01),
        by_hand.clipped(0.2, 0.2),
        by_hand.mean_over_rollouts,
    ),
    "gpg": compose(group(False), by_hand.log_probability, by_hand.mean_over_tokens),
    "sapo": compose(group(True), by_hand.soft_gate(1.0, 1.05), by_hand.mean_over_rollouts),
}


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The policy, and a reference that is not equal to it."""
    other, model = tmp_path_factory.mktemp("reference") / "model", load(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(other)
    return folder, other


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_preset_is_its_papers_formula(
    ranks: Ranks, folders: tuple[Path, Path], table: pa.Table, name: PresetName
) -> None:
    folder, other = folders
    model = load(folder)
    expected = FORMULAS[name](table, by_hand.rows_of(table, model, load(other)))
    expected.backward()
    extra: dict[str, Any] = {"reference": {"model": str(other)}} if "reference" in PRESETS[name] else {}
    algorithm = lr.GRPO(
        model=str(folder), preset=name, minibatch_rollouts=1000, gradient_clip=1e9, warmup_steps=0, **extra
    )
    ranks.build(algorithm.update_settings(folder).model_copy(update={"micro_batch_tokens": 300}))
    result = ranks.call("update", table)
    assert result["loss"] == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    gradients = ranks.gradients()
    for weight, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        assert gradients[weight] == pytest.approx(parameter.grad.numpy(), abs=1e-4 * scale)


def test_settings_that_are_given_win() -> None:
    algorithm = lr.GRPO(model="m", preset="grpo", clip_high=0.3, reference={"estimator": "k2"})
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.loss_aggregation) == (0.2, 0.3, "rollout-mean")
    assert (algorithm.reference.coefficient, algorithm.reference.estimator) == (0.04, "k2")
    algorithm.clip_high = 0.25
    assert (algorithm.clip_high, algorithm.reference.estimator) == (0.25, "k2")
    assert lr.GRPO(model="m", preset="dr-grpo", loss_aggregation="rollout-mean").loss_horizon is None
    dapo = lr.GRPO(model="m", preset="dapo", batch={"overlong": {"max_tokens": 4096, "cache_tokens": 512}})
    assert dapo.batch.groups.no_variance == "resample"
    assert dapo.batch.overlong is not None and dapo.batch.overlong.max_tokens == 4096


def test_without_a_preset_nothing_changes() -> None:
    plain = lr.GRPO(model="m")
    assert (plain.clip_low, plain.clip_high, plain.loss_aggregation) == (0.2, 0.28, "token-mean")
    assert not plain.reference.coefficient and not plain.correction.active and not plain.lora.rank


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.preset='gropo': input should be 'grpo'"):
        lr.GRPO(model="m", preset="gropo")
    with pytest.raises(ConfigError, match="would count the ratio twice"):
        lr.GRPO(model="m", correction={"weights": "token"})
    with pytest.raises(ConfigError, match="credit='step' belongs to advantage='grpo'"):
        lr.GRPO(model="m", preset="rloo", batch={"credit": "step"}).update_settings(Path("m"))
