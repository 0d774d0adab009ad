"""Parts of a trainer, however they are given."""

from __future__ import annotations

from typing import Any

import pytest

import lightning_ray as lr
from lightning_ray.components import build_component

BASELINE = "lightning_ray.algorithms.fast.Baseline"


def build(spec: Any, **more: Any) -> Any:
    return build_component(spec, expected_type=lr.Algorithm, spec_name="algorithm", **more)


def test_an_algorithm_may_be_given_in_five_ways() -> None:
    given = lr.Baseline()
    assert build(given) is given
    for spec in (lr.Baseline, lambda: lr.Baseline(), BASELINE, {"type": BASELINE}):
        assert isinstance(build(spec), lr.Baseline)
    assert build({"type": BASELINE, "n_epochs": 3}).n_epochs == 3
    assert build({"n_epochs": 4}, dict_default_cls=lr.Baseline).n_epochs == 4
    assert build(None) is None and isinstance(build(None, default_factory=lr.Baseline), lr.Baseline)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (3, "algorithm=3 is a int, not a Algorithm; give one"),
        ("Baseline", "algorithm='Baseline': .*; give the dotted name of a class"),
        ("lightning_ray.nothing.Baseline", "No module named 'lightning_ray.nothing'"),
        ("lightning_ray.algorithms.fast.Bassline", "has no attribute 'Bassline'"),
        ("lightning_ray.dev.TASKS", "is a int, not a class or factory"),
        ({"n_epochs": 1}, 'has no "type"'),
        ({"type": BASELINE, "epochs": 1}, "unexpected keyword argument 'epochs'"),
        (lambda: 5, "is a int, not a Algorithm"),
        (lr.OtelTracer, "is a OtelTracer, not a Algorithm"),
    ],
)
def test_what_makes_no_algorithm_is_named(spec: Any, message: str) -> None:
    with pytest.raises(lr.ConfigError, match=message):
        build(spec)


def test_a_trainer_takes_its_parts_so() -> None:
    adapter = {"agent_match": "solver"}
    trainer = lr.Trainer(algorithm={"type": BASELINE, "n_epochs": 2}, adapter=adapter, tracer=lr.DummyTracer)
    assert isinstance(trainer.algorithm, lr.Baseline) and isinstance(trainer.tracer, lr.DummyTracer)
    assert isinstance(trainer.adapter, lr.TracerTraceToTriplet) and trainer.adapter.agent_match == "solver"
    with pytest.raises(lr.ConfigError, match="adapter="):
        lr.Trainer(adapter=3)
