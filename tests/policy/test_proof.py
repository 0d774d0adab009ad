"""The proof of a swap: what counts as the same weights, and what a user is told when they are not."""

from __future__ import annotations

import math

import pytest

from lightning_ray.policy.proof import (
    PROBE_TOLERANCE,
    Proof,
    canary_prompts,
    differing_kinds,
    failure_message,
    max_difference,
)

NAN, INF = float("nan"), float("inf")


def test_canaries_are_the_same_everywhere_and_within_the_vocabulary() -> None:
    prompts = canary_prompts(100)
    assert prompts == canary_prompts(100) and prompts[0] != prompts[1]
    assert [len(p) for p in prompts] == [10, 10]
    assert all(type(t) is int and 0 <= t < 100 for p in prompts for t in p)
    assert max(t for p in canary_prompts(150_000) for t in p) > 75_000
    assert [len(p) for p in canary_prompts(5, length=3, count=4)] == [3] * 4


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ([[-1.0, -2.0]], [[-1.0, -2.0]], 0.0),
        ([[-1.0], [-2.0]], [[-1.25], [-2.5]], 0.5),
        ([[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-2.0]], 1.0),
        ([[-1.0]], [[-1.0, -2.0]], INF),
        ([[-1.0]], [[-1.0], [-1.0]], INF),
        ([[-1.0, -2.0], [-3.0]], [[-1.0], [-2.0, -3.0]], INF),
        ([], [], INF),
        ([[NAN]], [[NAN]], INF),
        ([[-1.0], [-1.0]], [[NAN], [-1.0]], INF),
        ([[-1.0], [-1.0]], [[-1.0], [NAN]], INF),
        ([[-INF]], [[-INF]], INF),
    ],
)
def test_the_largest_difference(expected: list[list[float]], found: list[list[float]], difference: float) -> None:
    assert max_difference(expected, found) == difference


@pytest.mark.parametrize(
    ("difference", "holds"), [(0.0, True), (1e-4, True), (1.1e-4, False), (INF, False), (NAN, False)]
)
def test_a_proof_holds_up_to_its_tolerance(difference: float, holds: bool) -> None:
    assert Proof("r", 1, difference, 1e-4).holds is holds


TRAINER = {
    "model.embed_tokens.weight": [2.0, -1.0],
    "model.layers.0.mlp.up_proj.weight": [1.0, 4.0],
    "model.layers.1.mlp.up_proj.weight": [-3.0, 0.0],
    "model.norm.weight": [0.0, 0.0],
}
HEAD = {"lm_head.weight": [2.0, -1.0]}
TIED = "lm_head.weight (tied to model.embed_tokens.weight)"


def test_equal_weights_differ_in_nothing() -> None:
    assert differing_kinds(TRAINER, TRAINER | HEAD) == {}
    close = {name: [number * (1 + PROBE_TOLERANCE / 2) for number in probe] for name, probe in TRAINER.items()}
    assert differing_kinds(TRAINER, close) == {}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"model.layers.1.mlp.up_proj.weight": [-3.0, 0.01]}, {"model.layers.*.mlp.up_proj.weight": 1}),
        ({"model.layers.1.mlp.up_proj.weight": [-2.9, 0.0]}, {"model.layers.*.mlp.up_proj.weight": 1}),
        (
            {"model.layers.0.mlp.up_proj.weight": [9.0, 4.0], "model.layers.1.mlp.up_proj.weight": [9.0, 0.0]},
            {"model.layers.*.mlp.up_proj.weight": 2},
        ),
        ({"model.norm.weight": [0.1, 0.0]}, {"model.norm.weight": 1}),
        ({"model.norm.weight": [0.0, NAN]}, {"model.norm.weight": 1}),
        ({"model.layers.7.extra.weight": [0.0, 0.0]}, {"model.layers.*.extra.weight": 1}),
        ({"lm_head.weight": [1.0, -1.0]}, {TIED: 1}),
        ({"model.layers.0.k_proj.bias": [0.0, 0.0]}, {}),
        ({"model.layers.0.k_proj.bias": [0.0, 0.1]}, {"model.layers.*.k_proj.bias": 1}),
    ],
)
def test_what_differs_is_named_by_its_kind(change: dict[str, list[float]], kinds: dict[str, int]) -> None:
    assert differing_kinds(TRAINER, TRAINER | HEAD | change) == kinds


def test_a_head_of_its_own_is_compared_with_itself() -> None:
    trainer = {**TRAINER, "lm_head.weight": [5.0, 0.0]}
    assert differing_kinds(trainer, trainer) == {}
    assert differing_kinds(trainer, trainer | HEAD) == {"lm_head.weight": 1}


def test_the_message_names_replica_version_difference_and_kinds() -> None:
    text = failure_message(Proof("r7", 3, 0.25, 1e-4), {"b.weight": 2, "a.weight": 1})
    for part in (
        "version 3",
        "replica r7",
        "2.50e-01",
        "1e-04",
        "a.weight (1), b.weight (2)",
        "Resume",
        "logprob_tolerance",
    ):
        assert part in text
    assert "No single parameter differs" in failure_message(Proof("r7", 3, math.inf, 1e-4), {})
